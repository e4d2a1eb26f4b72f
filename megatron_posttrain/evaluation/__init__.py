"""How good a model is on held-out problems."""

from megatron_posttrain.evaluation.evaluate import Evaluation, evaluate
from megatron_posttrain.evaluation.responses import Task
from megatron_posttrain.evaluation.statistics import wilson_interval

__all__ = ["Evaluation", "Task", "evaluate", "wilson_interval"]
