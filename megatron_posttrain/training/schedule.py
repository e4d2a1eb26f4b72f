"""How many steps a run has, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from typing import Any

from megatron_posttrain.config.schema import OptimizerConfig, TrainingConfig
from megatron_posttrain.errors import UserError


def total_steps(config: TrainingConfig, dataset: Any, rows: int) -> int:
    """`training.steps`, or those of `training.epochs` with `rows` of the data a step; of both the fewer."""
    if config.steps is None and config.epochs is None:
        raise UserError("training: give `steps` or `epochs`")
    of_epochs = [] if config.epochs is None else [dataset.steps_per_epoch(rows, config.epochs)]
    return min([*of_epochs, *([] if config.steps is None else [config.steps])])


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Learning rate of optimizer step `step` (from 0): linear warm-up, then decay to `min_lr` at the end."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = min(1.0, (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps))
    share = 1.0 - progress if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.min_lr + (config.lr - config.min_lr) * share
