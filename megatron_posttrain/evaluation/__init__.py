"""How good a model is on held-out problems."""

from megatron_posttrain.evaluation.evaluate import Evaluation, Settings, evaluate, wilson_interval

__all__ = ["Evaluation", "Settings", "evaluate", "wilson_interval"]
