"""The name by which scripts outside of this repository know `rollout.samples`."""

from megatron_posttrain.rollout.samples import generate_samples

__all__ = ["generate_samples"]
