"""Llama 2 and 3 (arXiv 2407.21783), with Llama 3's RoPE scaling."""

from megatron_posttrain.models import common
from megatron_posttrain.models.architecture import Architecture, HfConfig
from megatron_posttrain.models.weights import Mapping

FUSIONS = ()


def architecture(config: HfConfig) -> Architecture:
    bias = bool(config.get("attention_bias", False))
    return common.base_architecture(
        config, qkv_bias=bias, attention_output_bias=bias, mlp_bias=bool(config.get("mlp_bias", False))
    )


def table(arch: Architecture) -> list[Mapping]:
    return common.table(arch)
