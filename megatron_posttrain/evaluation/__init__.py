"""How good a model is on held-out problems."""

from megatron_posttrain.evaluation.evaluate import Evaluation, evaluate
from megatron_posttrain.evaluation.statistics import wilson_interval

__all__ = ["Evaluation", "evaluate", "wilson_interval"]
