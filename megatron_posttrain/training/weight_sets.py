"""Weight sets: named copies of a model's weights in host memory, which take its place for a while."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightSets:
    """Of one rank's modules. A set costs their bytes in host memory, and no device memory but for one tensor."""

    def __init__(self, modules: Sequence[nn.Module], *, trained_only: bool = False) -> None:
        tensors = [tensor for module in modules for tensor in [*module.parameters(), *module.buffers()]]
        self._tensors: list[Tensor] = [t.detach() for t in tensors if t.requires_grad or not trained_only]
        self._sets: dict[str, list[Tensor]] = {}

    def keep(self, name: str) -> None:
        """The present weights under `name`; those that had it before go."""
        self._sets[name] = [tensor.to("cpu", copy=True) for tensor in self._tensors]

    def drop(self, name: str) -> None:
        """Frees a set."""
        del self._sets[name]

    @contextmanager
    def use(self, name: str) -> Iterator[None]:
        """The model has the set's weights, and afterwards its own again, to the last bit. Raises KeyError for a name
        that was not kept."""
        copies = self._sets[name]
        self._exchange(copies)
        try:
            yield
        finally:
            self._exchange(copies)

    @torch.no_grad()
    def _exchange(self, copies: list[Tensor]) -> None:
        for own, other in zip(self._tensors, copies, strict=True):
            before = own.to("cpu", copy=True)
            own.copy_(other)
            other.copy_(before)


class HostWeights:
    """Of frozen modules, whose weights are in host memory and on the device only while they are used."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        parameters = [parameter for module in modules for parameter in module.parameters()]
        self._copies = [(parameter, parameter.data.to("cpu")) for parameter in parameters]
        self._leave()

    def _leave(self) -> None:
        for parameter, _ in self._copies:
            parameter.data = parameter.data.new_empty(0)

    @contextmanager
    def present(self) -> Iterator[None]:
        """Meanwhile the modules have them."""
        for parameter, copy in self._copies:
            parameter.data = copy.to(parameter.device)
        try:
            yield
        finally:
            self._leave()
