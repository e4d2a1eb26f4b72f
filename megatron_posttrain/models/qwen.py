"""Qwen2, Qwen2.5 and Qwen2-MoE (arXiv 2407.10671): query, key and value biases; a gated shared expert. Qwen3 and
Qwen3-MoE (arXiv 2505.09388): query-key norms; experts without shared ones."""

from typing import Any

from megatron_posttrain.models import common
from megatron_posttrain.models.architecture import Architecture, HfConfig, MixtureOfExperts
from megatron_posttrain.models.weights import Mapping, Replicated

FUSIONS = common.EXPERT_FUSIONS


def architecture(config: HfConfig) -> Architecture:
    family = config["model_type"]
    if family.endswith("_moe"):
        common.require(config, "use_sliding_window", (False,), False)
    if family.startswith("qwen3"):
        bias = bool(config.get("attention_bias", False))
        fields: dict[str, Any] = {"qk_norm": True, "qkv_bias": bias, "attention_output_bias": bias}
        if family == "qwen3_moe":
            fields["moe"] = mixture(config)
        else:  # transformers gives a model with experts no head_dim of its own
            fields["head_dim"] = config.get("head_dim") or 128
    else:
        fields = {"qkv_bias": bool(config.get("qkv_bias", True))}
        if family == "qwen2_moe":
            shared = common.need(config, "shared_expert_intermediate_size")
            fields["moe"] = mixture(config, shared_ffn_size=shared, shared_gate=True)
    if config.get("use_sliding_window", False):  # in the last layers
        window, first = config.get("sliding_window"), config.get("max_window_layers", 28)
        fields |= common.sliding_layers(config, window, first)
    return common.base_architecture(config, **fields)


def mixture(config: HfConfig, **fields: Any) -> MixtureOfExperts:
    step = config.get("decoder_sparse_step", 1)
    count = common.need(config, "num_hidden_layers")
    dense = {layer for layer in range(count) if (layer + 1) % step} | set(config.get("mlp_only_layers") or [])
    fields |= {"dense_layers": tuple(sorted(dense)), "normalize_top_k": bool(config.get("norm_topk_prob", False))}
    return common.mixture(config, ("num_experts", "num_local_experts"), "moe_intermediate_size", **fields)


def table(arch: Architecture) -> list[Mapping]:
    if arch.moe is None:
        return common.table(arch)
    hidden, block = arch.hidden_size, common.router(arch)
    if arch.moe.shared_ffn_size:
        ours, theirs = f"{common.LAYER}mlp.shared_experts.", f"{common.HF_LAYER}mlp.shared_expert"
        block += common.gated_mlp(ours, f"{theirs}.", hidden, arch.moe.shared_ffn_size)
        block.append(Replicated(f"{ours}gate_weight", (f"{theirs}_gate.weight",), ((1, hidden),)))
    return common.table(arch, block, common.experts(arch))
