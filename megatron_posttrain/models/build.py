"""An Architecture to megatron-core's config and this rank's model chunks."""

import math
from dataclasses import replace
from typing import Any

import torch

from megatron_posttrain.config.schema import ModelConfig, PrecisionConfig
from megatron_posttrain.errors import UserError
from megatron_posttrain.models.architecture import Architecture
from megatron_posttrain.models.head import ScalarHead, keep_fp32
from megatron_posttrain.models.modules import kernels
from megatron_posttrain.models.rope import concentration, inverse_frequencies
from megatron_posttrain.models.spec import block_spec
from megatron_posttrain.models.weights import padded_vocab_size
from megatron_posttrain.parallel.layout import Layout, stage_layers
from megatron_posttrain.platform import platform
from megatron_posttrain.platform.cuda import fp8_recipes
from megatron_posttrain.upstream.megatron import (
    count_down_projections_once,
    keep_correction_biases,
    mark_experts,
    split_down_projections,
)  # fmt: skip

# Tokens that a rank's matrix products come in multiples of: Transformer Engine refuses others.
FP8_TOKENS = {"delayed": 16, "tensorwise": 16, "blockwise": 128, "mxfp8": 32}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Options = dict[str, Any]  # fields of megatron-core's config


def use_transformer_engine(model: ModelConfig) -> bool:
    """Raises UserError where Transformer Engine is asked for and not there."""
    found = platform().has_transformer_engine()
    if model.implementation == "transformer_engine" and not found:
        where = f"Transformer Engine is not installed on this {platform().name} machine"
        raise UserError(f"model.implementation=transformer_engine, but {where}; allowed here: auto, torch")
    return model.implementation != "torch" and found


def transformer_config(arch: Architecture, layout: Layout, model: ModelConfig, precision: PrecisionConfig) -> Any:
    """megatron-core's TransformerConfig (MLATransformerConfig where `arch.mla`)."""
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    options = config_options(arch, layout, model, precision)
    if arch.mla is not None:
        return MLATransformerConfig(**options)
    config = TransformerConfig(**options)
    factor = concentration(arch.rope)
    if factor != 1.0:
        # Read by attention through these names: 0.1 * mscale * ln(scale) + 1.
        config.yarn_rotary_scaling_factor = arch.rope.factor
        config.yarn_mscale = (factor - 1.0) / (0.1 * math.log(arch.rope.factor))
        config.yarn_mscale_all_dim = 0.0
    return config


def config_options(arch: Architecture, layout: Layout, model: ModelConfig, precision: PrecisionConfig) -> Options:
    """The fields of megatron-core's config that are not left at their defaults."""
    transformer_engine = use_transformer_engine(model)
    options = _sizes(arch) | _parallelism(arch, layout, precision) | _fusions(arch, transformer_engine)
    if arch.moe is not None:
        options |= _experts(arch, layout, model, transformer_engine)
    if model.recompute == "full":
        options |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    elif model.recompute == "selective":
        options |= {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return options | _fp8(arch, layout, precision, transformer_engine) | _latent_attention(arch)


def build_model(
    arch: Architecture, layout: Layout, model: ModelConfig, precision: PrecisionConfig
) -> tuple[list[torch.nn.Module], Any]:
    """This rank's chunks (one, or `virtual_pipeline`) with uninitialised or random weights, and their config."""
    from megatron.core import parallel_state as ps
    from megatron.core.models.gpt import GPTModel

    chunks: list[torch.nn.Module] = []
    transformer_engine = use_transformer_engine(model)
    with platform().megatron():
        config = transformer_config(arch, layout, model, precision)
        for index in range(layout.chunks):
            stage = index if layout.virtual_pipeline else None
            chunk = GPTModel(
                config,
                block_spec(config, arch, transformer_engine, stage),
                vocab_size=padded_vocab_size(arch.vocab_size, layout.tensor),
                max_sequence_length=arch.max_position,
                pre_process=ps.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
                post_process=ps.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
                share_embeddings_and_output_weights=arch.tied_embeddings,
                position_embedding_type="rope",
                rotary_base=arch.rope.base,
                vp_stage=stage,
            )
            if arch.mla is None:
                frequencies = inverse_frequencies(arch.rope, arch.head_dim)
                chunk.rotary_pos_emb.inv_freq = frequencies.to(platform().device)
            mark_experts(chunk)
            keep_correction_biases(chunk)
            if transformer_engine:
                count_down_projections_once(chunk)
            elif layout.sequence_parallel:
                split_down_projections(chunk)
            _adjust(chunk, arch)
            if arch.padding_token is not None and chunk.pre_process:
                _leave_padding_alone(chunk.embedding.word_embeddings, arch.padding_token)
            if arch.scalar_head and chunk.post_process:
                chunk.output_layer = ScalarHead(config)
            elif precision.head == "fp32" and chunk.post_process:
                keep_fp32(chunk.output_layer)
            chunks.append(chunk.to(platform().device))
    return chunks, config


def _leave_padding_alone(embedding: torch.nn.Module, token: int) -> None:
    """The padding token's word embedding gets no gradient, as in transformers (`padding_idx`). There it starts as zero,
    where a norm multiplies gradients by 1 / sqrt(epsilon): one sampled padding token has the whole model's gradient
    clipped to nothing."""
    from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region

    def stop(module: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        padding = inputs[0] == token  # [b, s]
        if module.reduce_scatter_embeddings:  # the output is [s / tensor, b, hidden]
            padding = scatter_to_sequence_parallel_region(padding.t().contiguous())
        return torch.where(padding[..., None], output.detach(), output)

    embedding.register_forward_hook(stop)  # type: ignore[arg-type]


def _adjust(chunk: torch.nn.Module, arch: Architecture) -> None:
    """What megatron-core's options cannot say: it has one switch for the biases of attention's output and of the MLP,
    and wants apex to let Transformer Engine's products add weight gradients to the fp32 main gradients themselves."""
    for name, module in chunk.named_modules():
        attention = name.endswith("linear_proj") and not arch.attention_output_bias
        mlp = name.endswith(("linear_fc1", "linear_fc2")) and not arch.mlp_bias
        if (attention or mlp) and getattr(module, "bias", None) is not None:
            module.bias = None
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True  # type: ignore[assignment]


def _sizes(arch: Architecture) -> Options:
    # Of two functions by this name the one that megatron-core's fused activation is chosen by.
    from megatron.core.fusions.fused_bias_geglu import quick_gelu

    options: Options = {
        "num_layers": arch.num_layers,
        "hidden_size": arch.hidden_size,
        "num_attention_heads": arch.num_heads,
        "num_query_groups": arch.num_query_groups,
        "kv_channels": arch.head_dim,
        # A model whose every layer has experts still needs a dense width.
        "ffn_hidden_size": arch.ffn_size or (arch.moe.expert_ffn_size if arch.moe else 0),
        "normalization": "RMSNorm",
        "layernorm_epsilon": arch.norm_epsilon,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": arch.attention_output_bias or arch.mlp_bias,
        "add_qkv_bias": arch.qkv_bias,
        "qk_layernorm": arch.qk_norm or arch.mla is not None,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "attention_softmax_in_fp32": True,
    }
    if arch.attention_sinks:
        options["softmax_type"] = "learnable"
    if arch.sliding_window is not None:
        options["window_size"] = (arch.sliding_window - 1, 0)
        options["window_attn_skip_freq"] = [int(n in arch.sliding_layers) for n in range(arch.num_layers)]
    if arch.activation == "gpt_oss_glu":
        options |= {"activation_func": quick_gelu, "glu_linear_offset": 1.0, "activation_func_clamp_value": 7.0}
    return options


def _parallelism(arch: Architecture, layout: Layout, precision: PrecisionConfig) -> Options:
    dtype = DTYPES[precision.dtype]
    # In megatron-core's language: E embedding, t transformer layer, | next chunk, L loss.
    stages = "E" + "|".join("t" * count for count in stage_layers(layout, arch.num_layers)) + "L"
    return {
        "tensor_model_parallel_size": layout.tensor,
        "pipeline_model_parallel_size": layout.pipeline,
        "virtual_pipeline_model_parallel_size": layout.virtual_pipeline,
        "pipeline_model_parallel_layout": stages if layout.pipeline > 1 else None,
        "context_parallel_size": layout.context,
        "expert_model_parallel_size": layout.expert,
        "expert_tensor_parallel_size": layout.expert_tensor,
        "sequence_parallel": layout.sequence_parallel,
        "pipeline_dtype": dtype,
        "params_dtype": dtype,
        "bf16": precision.dtype == "bf16",
        # Micro-batches are packed rows of different lengths.
        "variable_seq_lengths": layout.pipeline > 1,
        "moe_token_dispatcher_type": "alltoall",  # the default, allgather, refuses variable lengths
        # An interleaved pipeline of two stages has one neighbour on both sides; only separate sends and
        # receives keep its forward and backward messages apart.
        "overlap_p2p_comm": layout.virtual_pipeline is not None,
        "batch_p2p_comm": layout.virtual_pipeline is None,
        "use_cpu_initialization": False,
    }


def _fusions(arch: Architecture, transformer_engine: bool) -> Options:
    compiled = transformer_engine or kernels.compiled_pointwise()
    biased_experts = arch.moe is not None and (arch.attention_output_bias or arch.mlp_bias)
    return {
        "bias_activation_fusion": compiled,
        "bias_dropout_fusion": compiled and not biased_experts,  # refused by megatron-core's grouped experts
        # Transformer Engine's kernel for packed rows leaves out YaRN's factor on cosine and sine, and
        # megatron-core (rope_utils 288) does not say so; of MLA its fusion is called experimental.
        "apply_rope_fusion": transformer_engine and arch.mla is None and concentration(arch.rope) == 1.0,
        "masked_softmax_fusion": False,  # for its unpacked attention only
        "persist_layer_norm": False,  # needs apex
        "gradient_accumulation_fusion": False,  # needs apex
    }


def check_fp8(arch: Architecture, layout: Layout, precision: PrecisionConfig, capability: tuple[int, int]) -> None:
    """Raises UserError for what Transformer Engine or a GPU of this compute capability does not run."""
    recipe = precision.fp8
    if recipe is None:
        if precision.bf16_ends:
            raise UserError(f"precision.bf16_ends: {precision.bf16_ends} needs precision.fp8")
        return
    if precision.dtype != "bf16":
        raise UserError(f"precision.fp8: {recipe} needs precision.dtype bf16, found {precision.dtype}")
    if precision.bf16_ends and recipe == "delayed":
        raise UserError("precision.bf16_ends: megatron-core has none for the delayed recipe; allowed: 0")
    if recipe not in (allowed := fp8_recipes(capability)):
        raise UserError(
            f"precision.fp8: {recipe} does not run on compute capability {capability[0]}.{capability[1]}; "
            f"allowed: {', '.join((*allowed, 'null'))}"
        )
    if recipe == "blockwise" and layout.sequence_parallel and arch.hidden_size % FP8_TOKENS["blockwise"]:
        raise UserError(
            f"precision.fp8: blockwise with parallel.tensor > 1 gathers blocks of 128, and this model is "
            f"{arch.hidden_size} wide; allowed: parallel.tensor=1, or precision.fp8 of tensorwise or delayed"
        )


def _fp8(arch: Architecture, layout: Layout, precision: PrecisionConfig, transformer_engine: bool) -> Options:
    """Linear layers and experts in FP8; router, logits, norms and attention stay as they are. Per-tensor scales have
    e5m2's range for gradients; scales per block (DeepSeek-V3, arXiv 2412.19437, 3.3; OCP MX) are fine enough for e4m3
    everywhere."""
    recipe = precision.fp8
    if recipe is not None and not transformer_engine:
        raise UserError(f"precision.fp8: {recipe} needs Transformer Engine, which is not in use here; allowed: null")
    check_fp8(arch, layout, precision, torch.cuda.get_device_capability() if recipe is not None else (0, 0))
    if recipe is None:
        return {}
    options: Options = {"fp8": "e4m3" if recipe in ("blockwise", "mxfp8") else "hybrid", "fp8_recipe": recipe}
    if recipe == "delayed":
        options |= {"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"}
    if ends := precision.bf16_ends:
        options |= dict.fromkeys(("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"), ends)
        options["first_last_layers_bf16"] = True
    return options


def _experts(arch: Architecture, layout: Layout, model: ModelConfig, transformer_engine: bool) -> Options:
    moe, wanted, balancing = arch.moe, model.moe.aux_loss_coefficient, model.moe.load_balancing
    assert moe is not None
    coefficient = moe.aux_loss_coefficient if wanted is None else wanted
    return {
        "num_moe_experts": moe.num_experts,
        "moe_router_topk": moe.top_k,
        "moe_ffn_hidden_size": moe.expert_ffn_size,
        "moe_layer_freq": [int(arch.is_moe_layer(n)) for n in range(arch.num_layers)],
        "moe_shared_expert_intermediate_size": moe.shared_ffn_size or None,
        "moe_shared_expert_gate": moe.shared_gate,
        "moe_router_score_function": moe.score_function,
        # Softmax over the chosen logits equals softmax over all of them, renormalised over the chosen.
        "moe_router_pre_softmax": moe.score_function == "softmax" and not moe.normalize_top_k,
        "moe_router_num_groups": moe.num_groups,
        "moe_router_group_topk": moe.top_k_groups,
        "moe_router_topk_scaling_factor": moe.scaling_factor if moe.scaling_factor != 1.0 else None,
        "moe_router_enable_expert_bias": moe.correction_bias,
        "moe_router_bias_update_rate": 0.0,  # post-training keeps the checkpoint's biases
        "moe_router_load_balancing_type": balancing if coefficient else "none",
        "moe_aux_loss_coeff": coefficient if balancing != "none" else 0.0,
        "moe_z_loss_coeff": model.moe.z_loss_coefficient or None,
        "moe_router_dtype": "fp32",  # in bf16 experts flip between trainer and engine
        "moe_grouped_gemm": transformer_engine,
        "moe_permute_fusion": transformer_engine,
    } | (_deepep(layout) if model.moe.dispatcher == "deepep" else {})


def _deepep(layout: Layout) -> Options:
    if not platform().has_deepep():
        raise UserError("model.moe.dispatcher: deepep needs CUDA and the package deep_ep; allowed here: alltoall")
    if layout.tensor * layout.expert == 1:
        raise UserError("model.moe.dispatcher: deepep needs parallel.tensor or parallel.expert of 2 or more")
    return {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": "deepep"}


def _latent_attention(arch: Architecture) -> Options:
    if (mla := arch.mla) is None:
        return {}
    rope = arch.rope
    scaled = rope if rope.scaling == "yarn" else replace(rope, factor=1.0, mscale=1.0, mscale_all_dim=0.0)
    return {
        "q_lora_rank": mla.q_rank,
        "kv_lora_rank": mla.kv_rank,
        "qk_head_dim": mla.qk_nope_dim,
        "qk_pos_emb_head_dim": mla.qk_rope_dim,
        "v_head_dim": mla.v_dim,
        "rope_type": "yarn" if rope.scaling == "yarn" else "rope",
        "rotary_base": rope.base,
        "rotary_scaling_factor": scaled.factor,
        "original_max_position_embeddings": rope.original_max_position or arch.max_position,
    } | {name: getattr(scaled, name) for name in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")}
