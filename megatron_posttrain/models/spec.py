"""Layer specs: which module stands in which slot. torch modules of ours, or Transformer Engine's."""

import copy
from typing import Any

from megatron_posttrain.models.architecture import Architecture
from megatron_posttrain.models.modules import kernels
from megatron_posttrain.models.modules.attention import PackedAttention
from megatron_posttrain.models.modules.norm import RMSNorm


def block_spec(config: Any, arch: Architecture, transformer_engine: bool, vp_stage: int | None) -> Any:
    """The layers of this pipeline stage (and virtual stage), dense or with experts, and the final norm."""
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_decoder_block_spec,
        get_gpt_layer_local_spec,
        get_num_layers_to_build,
    )
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    if transformer_engine:
        block = get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage)
        if arch.attention_sinks:
            # Transformer Engine 2.11 has no kernel that takes both sinks and packed sequences.
            block.layer_specs = copy.deepcopy(block.layer_specs)
            for spec in block.layer_specs:
                spec.submodules.self_attention.submodules.core_attention = PackedAttention
        return block

    def layer(experts: int | None) -> Any:
        spec = get_gpt_layer_local_spec(
            num_experts=experts,
            qk_layernorm=config.qk_layernorm,
            multi_latent_attention=config.multi_latent_attention,
            normalization="RMSNorm",
        )
        # Stock experts cannot train biases on one rank: they are added in place to a custom function's view.
        grouped = kernels.grouped_matmul(config.params_dtype) or arch.mlp_bias
        return _with_torch_modules(spec, config.qk_layernorm, grouped)

    dense = layer(None)
    sparse = layer(config.num_moe_experts) if arch.moe else None
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    numbers = range(first, first + get_num_layers_to_build(config, vp_stage=vp_stage))
    layers = [sparse if arch.is_moe_layer(n) else dense for n in numbers]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)


def _with_torch_modules(spec: Any, qk_norm: bool, grouped_experts: bool) -> Any:
    """The local spec with our norm and attention, and experts where they gain, in its slots."""
    spec = copy.deepcopy(spec)
    layer, attention = spec.submodules, spec.submodules.self_attention.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    attention.core_attention = PackedAttention
    if qk_norm:
        attention.q_layernorm = RMSNorm
        name = "kv_layernorm" if hasattr(attention, "kv_layernorm") else "k_layernorm"
        setattr(attention, name, RMSNorm)
    experts = getattr(layer.mlp.submodules, "experts", None)
    if grouped_experts and experts is not None:
        from megatron_posttrain.models.modules.experts import GroupedExperts

        experts.module = GroupedExperts
    # The keys map renames norms to Transformer Engine's fused names in checkpoints; ours keep one name
    # whatever the implementation, see checkpoint/.
    return spec
