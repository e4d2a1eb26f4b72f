"""Mistral (arXiv 2310.06825): Llama's tensors, and in the first releases a sliding window in every layer."""

from megatron_posttrain.models import common
from megatron_posttrain.models.architecture import Architecture, HfConfig
from megatron_posttrain.models.weights import Mapping

FUSIONS = ()


def architecture(config: HfConfig) -> Architecture:
    window = config.get("sliding_window", 4096)
    return common.base_architecture(config, **common.sliding_layers(config, window, 0))


def table(arch: Architecture) -> list[Mapping]:
    return common.table(arch)
