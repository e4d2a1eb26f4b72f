"""Qwen3 and Qwen3-MoE (arXiv 2505.09388): query-key norms; experts without shared ones."""

from megatron_posttrain.models import common, qwen2
from megatron_posttrain.models.architecture import Architecture, HfConfig
from megatron_posttrain.models.weights import Mapping

FUSIONS = common.EXPERT_FUSIONS


def architecture(config: HfConfig) -> Architecture:
    bias = bool(config.get("attention_bias", False))
    moe = config["model_type"] == "qwen3_moe"
    # transformers gives a model with experts no head_dim of its own
    default = {} if moe else {"head_dim": config.get("head_dim") or 128}
    if moe:
        common.require(config, "use_sliding_window", (False,), False)
    return common.base_architecture(
        config,
        qk_norm=True,
        qkv_bias=bias,
        attention_output_bias=bias,
        moe=qwen2.mixture(config) if moe else None,
        **default,
        **qwen2.window(config),
    )


def table(arch: Architecture) -> list[Mapping]:
    if arch.moe is None:
        return common.table(arch)
    return common.table(arch, common.router(arch), common.experts(arch))
