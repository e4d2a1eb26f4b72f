"""How many steps a run has, and the learning rate as a pure function of the step."""

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
    """Learning rate of optimizer step `step` (from 0): linear warm-up, then decay to `min_lr` at the end.

    Of T steps, D of them decay: cosine and linear from the warm-up's end on, wsd (warm-up, stable, decay; arXiv
    2404.06395, eq. 1; linear as in arXiv 2405.18392) in the last `decay_steps`, by
    min_lr + (lr - min_lr) (T - step) / D for step >= T - D, `lr` before. A warm-up that reaches into them shortens D.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    decays = total_steps - config.warmup_steps
    if config.schedule == "wsd":
        decays = min(decays, config.decay_steps or math.ceil(total_steps / 10))
    progress = min(1.0, max(0, step - (total_steps - decays)) / max(1, decays))
    share = 0.5 * (1.0 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1.0 - progress
    return config.min_lr + (config.lr - config.min_lr) * share
