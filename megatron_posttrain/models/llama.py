"""Llama 2 and 3 (arXiv 2407.21783), with Llama 3's RoPE scaling. Mistral (arXiv 2310.06825): the same tensors, and in
the first releases a sliding window in every layer."""

from megatron_posttrain.models import common
from megatron_posttrain.models.architecture import Architecture, HfConfig

FUSIONS = ()


def architecture(config: HfConfig) -> Architecture:
    if config["model_type"] == "mistral":
        return common.base_architecture(config, **common.sliding_layers(config, config.get("sliding_window", 4096), 0))
    bias, mlp_bias = (bool(config.get(key, False)) for key in ("attention_bias", "mlp_bias"))
    return common.base_architecture(config, qkv_bias=bias, attention_output_bias=bias, mlp_bias=mlp_bias)


table = common.table
