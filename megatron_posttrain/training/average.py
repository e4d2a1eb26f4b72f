"""An exponential moving average of the fp32 main weights: one more state of the optimizer, 4 bytes a parameter of this
rank's shard, which is offloaded, saved and loaded as its moments are."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

AVERAGE = "average"


def _weights(optimizer: Any) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """This rank's main weights, and their states."""
    for part in optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            for main in group["params"]:
                yield main.detach(), part.optimizer.state[main]


def update(optimizer: Any, decay: float) -> None:
    """After an optimizer step t: a_t = decay a_(t-1) + (1 - decay) w_t, a_1 = w_1 (as torch.optim.swa_utils)."""
    for main, state in _weights(optimizer):
        if AVERAGE in state:
            state[AVERAGE].lerp_(main, 1 - decay)
        else:
            state[AVERAGE] = main.clone()


def make_room(optimizer: Any) -> None:
    """For averages that are to be loaded."""
    for main, state in _weights(optimizer):
        state[AVERAGE] = torch.empty_like(main)


@contextmanager
def used(optimizer: Any, gather: Callable[[], None]) -> Iterator[None]:
    """The model has the averages, and afterwards its own weights again, to the last bit; `gather`: from shards."""

    def exchange() -> None:
        for main, state in _weights(optimizer):
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
