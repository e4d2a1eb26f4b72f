"""Weights that take the place of a model's for a while: named copies in host memory, and an exponential moving average
of the fp32 main weights, one more state of the optimizer, which is offloaded, saved and loaded as its moments are."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

AVERAGE = "average"  # 4 bytes a parameter of this rank's shard


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


def _main_weights(optimizer: Any) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """This rank's main weights, and their states."""
    for part in optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            for main in group["params"]:
                yield main.detach(), part.optimizer.state[main]


def update_average(optimizer: Any, decay: float) -> None:
    """After an optimizer step t: a_t = decay a_(t-1) + (1 - decay) w_t, a_1 = w_1 (as torch.optim.swa_utils)."""
    for main, state in _main_weights(optimizer):
        if AVERAGE in state:
            state[AVERAGE].lerp_(main, 1 - decay)
        else:
            state[AVERAGE] = main.clone()


def make_room_for_average(optimizer: Any) -> None:
    """For averages that are to be loaded."""
    for main, state in _main_weights(optimizer):
        state[AVERAGE] = torch.empty_like(main)


@contextmanager
def average_used(optimizer: Any, gather: Callable[[], None]) -> Iterator[None]:
    """The model has the averages, and afterwards its own weights again, to the last bit; `gather`: from shards."""

    def exchange() -> None:
        for main, state in _main_weights(optimizer):
            before = main.clone()
            main.copy_(state[AVERAGE])
            state[AVERAGE].copy_(before)
        for part in optimizer.chained_optimizers:
            part._copy_main_params_to_model_params()
        gather()

    exchange()
    try:
        yield
    finally:
        exchange()
