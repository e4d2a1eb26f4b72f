"""Where a loss, gradient or log-prob that is not finite comes from: looked for only once it is there."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_posttrain.errors import NotFiniteError
from megatron_posttrain.models.sharded import naming, position, unwrap
from megatron_posttrain.parallel.exchange import gathered
from megatron_posttrain.platform import platform

if TYPE_CHECKING:
    from megatron_posttrain.training.engine import Engine

WEIGHT, FORWARD, GRADIENT = range(3)  # what is looked at first: it spoils all that follows


def anywhere(bad: bool) -> bool:
    """Collective over all ranks, whose answers have to agree: whether it is so on one of them."""
    flag = torch.tensor([int(bad)], device=platform().device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag.item())


class Fault(NamedTuple):
    order: tuple[int, ...]  # the smallest of all ranks is the one first seen
    rank: int
    text: str


class Recorder:
    """Remembers the first output that is not finite of this rank's modules, in the order in which they end."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.found: list[Fault] = []
        self.calls = itertools.count()
        self.micro_batch = [-1] * len(engine.modules)

    def watch(self, hooks: ExitStack) -> None:
        for index, (stage, model, name_of) in enumerate(_stages(self.engine)):
            hooks.callback(model.register_forward_pre_hook(partial(self._begins, index)).remove)
            for name, module in model.named_modules():
                text = f"the output of {name_of(name) if name else 'the model'}"
                hooks.callback(module.register_forward_hook(partial(self._ends, index, stage, text)).remove)

    def _begins(self, index: int, *unused: Any) -> None:
        self.micro_batch[index] += 1

    def _ends(self, index: int, stage: int, text: str, module: nn.Module, inputs: Any, output: Any) -> None:
        self.look(output, index, stage, text)

    def look(self, output: Any, index: int, stage: int, text: str) -> None:
        call = next(self.calls)
        parts = output if isinstance(output, tuple | list) else [output]
        if not self.found and not all(_finite(part) for part in parts if isinstance(part, Tensor)):
            batch = self.micro_batch[index]
            self.found.append(Fault((FORWARD, batch, stage, call), dist.get_rank(), f"{text}, micro-batch {batch}"))


def refuse(engine: Engine, what: str, forward: Callable[[Recorder], Any], *, gradients: bool = False) -> None:
    """Collective: raises NotFiniteError that names the rank and the layer where `what` was first not finite. `forward`
    repeats the forward passes, for the recorder that it is given; `gradients`: whether there are any to look at."""
    recorder = Recorder(engine)
    found = list(_first_weight(engine))
    with torch.no_grad(), ExitStack() as hooks:
        recorder.watch(hooks)
        forward(recorder)
    found += recorder.found
    if gradients:
        found += _last_gradient(engine)
    first = min(itertools.chain(*gathered(found)), default=None)
    overflow = "each value by itself is finite: an overflow"
    where = f"first seen on rank {first.rank} in {first.text}" if first else overflow
    raise NotFiniteError(f"{what}; {where}. The step was not trained on, nothing of it is saved")


def _stages(engine: Engine) -> Iterator[tuple[int, nn.Module, Callable[[str], str]]]:
    """Of every chunk: its place in the whole model, the model itself, and names with global numbers of layers."""
    rank, size = position(engine.groups.pipeline)
    for index, model in enumerate(map(unwrap, engine.modules)):
        yield index * size + rank, model, naming(model, engine.arch, position(engine.groups.expert))


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def _first_weight(engine: Engine) -> Iterator[Fault]:
    for stage, model, name_of in _stages(engine):
        for number, (name, parameter) in enumerate(model.named_parameters()):
            if not _finite(parameter.detach()):
                yield Fault((WEIGHT, stage, number), dist.get_rank(), f"the weight {name_of(name)}")
                return


def _last_gradient(engine: Engine) -> list[Fault]:
    """Backward passes begin at the last layer. A rank's own gradients outside of its shard are not yet summed over
    ranks: the rank with most values that are not finite is the one that made them."""
    found, bad = [], 0
    for stage, model, name_of in _stages(engine):
        for number, (name, parameter) in enumerate(model.named_parameters()):
            if count := int((~parameter.main_grad.isfinite()).sum()):  # type: ignore[attr-defined]
                bad += count
                found.append(((GRADIENT, -stage, -number), f"the gradient of {name_of(name)}"))
    return [Fault((*order, -bad), dist.get_rank(), text) for order, text in found]
