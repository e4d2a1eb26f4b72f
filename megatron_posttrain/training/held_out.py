"""What held-out rows decide: the best step, and whether to stop early."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from megatron_posttrain.config.algorithms import ALGORITHMS
from megatron_posttrain.config.schema import CheckpointConfig, Config
from megatron_posttrain.errors import nearest


class Best:
    """The best value so far of `checkpoint.best`, its step, and how many looks in a row were no better."""

    def __init__(self, config: CheckpointConfig) -> None:
        self.name = config.best
        higher = config.best != "validation_loss" if config.best_is is None else config.best_is == "higher"
        self.sign = 1.0 if higher else -1.0
        self.step, self.value, self.looks = 0, 0.0, 0

    def look(self, step: int, figures: Mapping[str, float]) -> bool:
        """Whether step number `step` is the best so far; one that logged no such figure, or NaN, is not."""
        if self.name is None or self.name not in figures:
            return False
        value = figures[self.name]
        better = math.isfinite(value) and (not self.step or self.sign * value > self.sign * self.value)
        self.looks = 0 if better else self.looks + 1
        if better:
            self.step, self.value = step, value
        return better

    def state(self) -> dict[str, Any]:
        return {"name": self.name, "step": self.step, "value": self.value, "looks": self.looks}

    def load(self, state: Mapping[str, Any] | None) -> None:
        """What a checkpoint has; of another figure it tells nothing."""
        if state and state["name"] == self.name:
            self.step, self.value, self.looks = state["step"], state["value"], state["looks"]


def held_out_problems(config: Config) -> Iterator[str]:
    """Keys about held-out rows that would have no effect, or ask for a figure that is not there."""
    names = [f"validation_{name}" for name in ALGORITHMS[config.command].held_out]
    best = config.checkpoint.best
    for key, value in {"training.validate_every": config.training.validate_every, "checkpoint.best": best}.items():
        if value is not None and not names:
            yield f"{key}={value} has no effect: `{config.command}` looks at no held-out rows; allowed: null"
        elif value is not None and config.data.validation is None:
            yield f"{key}={value} needs data.validation"
    if best is not None and names and best not in names:
        yield f"checkpoint.best={best} is no figure of held-out rows{nearest(best, names)}; allowed: {', '.join(names)}"
    if best is None:
        export = config.checkpoint.export if config.checkpoint.export == "best" else None
        keys = {"training.patience": config.training.patience, "checkpoint.best_is": config.checkpoint.best_is}
        given = (keys | {"checkpoint.export": export}).items()
        yield from (f"{key}={value} needs checkpoint.best" for key, value in given if value is not None)
