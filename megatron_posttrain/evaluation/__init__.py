"""How good a model is on held-out problems."""

from megatron_posttrain.evaluation.evaluate import Evaluation, evaluate, wilson_interval

__all__ = ["Evaluation", "evaluate", "wilson_interval"]
