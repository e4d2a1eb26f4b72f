"""Which rows are worth training on, told without a model: rules, duplicates, contamination."""

from megatron_posttrain.curation.curate import Rules, curate

__all__ = ["Rules", "curate"]
