"""Qwen3 and Qwen3-MoE (arXiv 2505.09388): query-key norms, no biases, experts without shared ones."""

from __future__ import annotations

from typing import Any

from megatron_posttrain.models import common
from megatron_posttrain.models.architecture import Architecture, HfConfig, MixtureOfExperts
from megatron_posttrain.models.layout import Fusion
from megatron_posttrain.models.weights import Mapping, on

FUSIONS = (
    Fusion(
        "model.layers.*.mlp.experts.gate_up_proj",
        ("model.layers.*.mlp.experts.*.gate_proj.weight", "model.layers.*.mlp.experts.*.up_proj.weight"),
    ),
    Fusion("model.layers.*.mlp.experts.down_proj", ("model.layers.*.mlp.experts.*.down_proj.weight",)),
)


def architecture(config: HfConfig) -> Architecture:
    """Refuses an activation or a RoPE variant that it does not know (`UserError`)."""
    bias = bool(config.get("attention_bias", False))
    windowed = bool(config.get("use_sliding_window", False))
    return common.base_architecture(
        config,
        config["model_type"],
        head_dim=config.get("head_dim") or 128,
        qk_norm=True,
        qkv_bias=bias,
        attention_output_bias=bias,
        moe=mixture(config) if config["model_type"] == "qwen3_moe" else None,
        **common.sliding_layers(config, windowed, config.get("max_window_layers", 0)),
    )


def mixture(config: HfConfig) -> MixtureOfExperts:
    step = config.get("decoder_sparse_step", 1)
    count = common.need(config, "num_hidden_layers")
    dense = {layer for layer in range(count) if (layer + 1) % step} | set(config.get("mlp_only_layers") or [])
    return MixtureOfExperts(
        num_experts=common.need(config, "num_experts", "num_local_experts"),
        top_k=common.need(config, "num_experts_per_tok"),
        expert_ffn_size=common.need(config, "moe_intermediate_size"),
        dense_layers=tuple(sorted(dense)),
        normalize_top_k=bool(config.get("norm_topk_prob", False)),
        aux_loss_coefficient=float(config.get("router_aux_loss_coef", 0.001)),
    )


def hf_config(arch: Architecture, source: HfConfig | None = None) -> HfConfig:
    fields: dict[str, Any] = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
    if moe := arch.moe:
        fields = {
            "model_type": "qwen3_moe",
            "architectures": ["Qwen3MoeForCausalLM"],
            "num_experts": moe.num_experts,
            "num_experts_per_tok": moe.top_k,
            "moe_intermediate_size": moe.expert_ffn_size,
            "norm_topk_prob": moe.normalize_top_k,
            "router_aux_loss_coef": moe.aux_loss_coefficient,
            "mlp_only_layers": list(moe.dense_layers),
            "decoder_sparse_step": 1,
        }
    window = {"use_sliding_window": arch.sliding_window is not None, "sliding_window": arch.sliding_window}
    return common.base_config(arch, source, attention_bias=arch.qkv_bias, **window, **fields)


def table(arch: Architecture) -> list[Mapping]:
    everywhere = [*common.layer_norms(arch), *common.attention(arch)]
    rows = common.embeddings(arch) + on(range(arch.num_layers), everywhere)
    rows += on(common.layers(arch, moe=False), common.dense_mlp(arch))
    if arch.moe is not None:
        moe_layers = common.layers(arch, moe=True)
        rows += on(moe_layers, [common.router(arch)])
        rows += on(moe_layers, common.experts(arch), experts=arch.moe.num_experts)
    return rows + common.output(arch)
