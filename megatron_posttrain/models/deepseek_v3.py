"""DeepSeek-V3 and R1 (arXiv 2412.19437): latent attention, sigmoid router with correction bias, MTP."""

import torch

from megatron_posttrain.errors import UserError
from megatron_posttrain.models import common
from megatron_posttrain.models.architecture import Architecture, HfConfig, MultiLatentAttention
from megatron_posttrain.models.weights import ColumnParallel, Mapping, Replicated, RowParallel, on

FUSIONS = common.EXPERT_FUSIONS
MTP = "mtp.layers.*."
MTP_COUNTS = ("num_nextn_predict_layers", "num_mtp_layers")  # of a config: published, newer


def architecture(config: HfConfig) -> Architecture:
    common.require(config, "attention_bias", (False,), False)
    common.require(config, "rope_interleave", (True, None), True)
    common.require(config, "scoring_func", ("sigmoid",), "sigmoid")
    common.require(config, "topk_method", ("noaux_tc",), "noaux_tc")
    common.require(config, "moe_layer_freq", (1,), 1)
    common.require(config, "norm_topk_prob", (True,), True)  # megatron-core always normalises sigmoid scores
    mla = MultiLatentAttention(
        q_rank=config.get("q_lora_rank"),
        kv_rank=common.need(config, "kv_lora_rank"),
        qk_nope_dim=common.need(config, "qk_nope_head_dim"),
        qk_rope_dim=common.need(config, "qk_rope_head_dim"),
        v_dim=common.need(config, "v_head_dim"),
    )
    width = common.need(config, "moe_intermediate_size")
    top_k = common.need(config, "num_experts_per_tok")
    groups, chosen = config.get("n_group") or 1, config.get("topk_group") or 1
    if groups > 1 and chosen != groups and top_k // chosen != 2:
        # A group's score is the sum of its two best experts; megatron-core sums its top_k // topk_group best.
        needed = f"with topk_group={chosen} it has to be {2 * chosen}"
        raise UserError(f"config.json: num_experts_per_tok is {top_k}; {needed}")
    moe = common.mixture(
        config,
        ("n_routed_experts", "num_local_experts"),
        "moe_intermediate_size",
        0.0,
        shared_ffn_size=width * (config.get("n_shared_experts") or 0),
        first_dense_layers=config.get("first_k_dense_replace", 3),
        score_function="sigmoid",
        correction_bias=True,
        num_groups=config.get("n_group"),
        top_k_groups=config.get("topk_group"),
        scaling_factor=float(config.get("routed_scaling_factor", 2.5)),
    )
    return common.base_architecture(
        config,
        num_query_groups=common.need(config, "num_attention_heads"),
        head_dim=mla.v_dim,
        mla=mla,
        moe=moe,
        num_mtp_layers=next((config[name] for name in MTP_COUNTS if name in config), 0),
    )


def ignored(arch: Architecture) -> list[str]:
    """The multi-token-prediction layer follows the others; where it was dropped its tensors do no harm."""
    return [] if arch.num_mtp_layers else [rf"model\.layers\.{arch.num_layers}\..*"]


def _rows(ours: str, theirs: str, *names: tuple[type[Mapping], str, str, tuple[int, ...]]) -> list[Mapping]:
    """A row for each (kind, megatron's name, Hugging Face's name, shape) of a weight."""
    return [kind(f"{ours}{our}.weight", (f"{theirs}{their}.weight",), (shape,)) for kind, our, their, shape in names]


def attention(arch: Architecture, layer: str) -> list[Mapping]:
    """MLA. megatron-core splits the down-projections over ranks, Transformer Engine keeps them whole."""
    mla, hidden = arch.mla, arch.hidden_size
    assert mla is not None
    query, up = (arch.num_heads * (mla.qk_nope_dim + width) for width in (mla.qk_rope_dim, mla.v_dim))
    whole_query = [(ColumnParallel, "linear_q_proj", "q_proj", (query, hidden))]
    low_rank_query = [
        (ColumnParallel, "linear_q_down_proj", "q_a_proj", (mla.q_rank or 0, hidden)),
        (Replicated, "q_layernorm", "q_a_layernorm", (mla.q_rank or 0,)),
        (ColumnParallel, "linear_q_up_proj", "q_b_proj", (query, mla.q_rank or 0)),
    ]
    return _rows(
        f"{layer}self_attention.", f"{common.HF_LAYER}self_attn.",
        *(whole_query if mla.q_rank is None else low_rank_query),
        (ColumnParallel, "linear_kv_down_proj", "kv_a_proj_with_mqa", (mla.kv_rank + mla.qk_rope_dim, hidden)),
        (Replicated, "kv_layernorm", "kv_a_layernorm", (mla.kv_rank,)),
        (ColumnParallel, "linear_kv_up_proj", "kv_b_proj", (up, mla.kv_rank)),
        (RowParallel, "linear_proj", "o_proj", (hidden, arch.num_heads * mla.v_dim)),
    )  # fmt: skip


def sparse(arch: Architecture, layers: range, layer: str, offset: int = 0) -> list[Mapping]:
    """Router, shared expert and experts of `layers`, whose Hugging Face numbers are larger by `offset`."""
    moe = arch.moe
    assert moe is not None
    ours, theirs = f"{layer}mlp.router.expert_bias", f"{common.HF_LAYER}mlp.gate.e_score_correction_bias"
    bias = Replicated(ours, (theirs,), ((moe.num_experts,),), dtype=torch.float32)
    rows = [*common.router(arch, layer=layer), bias]
    if moe.shared_ffn_size:
        ours, theirs = f"{layer}mlp.shared_experts.", f"{common.HF_LAYER}mlp.shared_experts."
        rows += common.gated_mlp(ours, theirs, arch.hidden_size, moe.shared_ffn_size)
    experts = on(layers, common.experts(arch, layer=layer), experts=moe.num_experts, hf_layer_offset=offset)
    return on(layers, rows, hf_layer_offset=offset) + experts


def table(arch: Architecture) -> list[Mapping]:
    assert arch.moe is not None

    def base(layer: str) -> list[Mapping]:
        return [*common.layer_norms(arch, layer), *attention(arch, layer)]

    hidden, mtp, first = arch.hidden_size, range(arch.num_mtp_layers), arch.num_layers
    stored = [f"model.layers.{first + number}." for number in mtp]
    rows = common.embeddings(arch, copies=tuple(f"{name}embed_tokens.weight" for name in stored))
    rows += on(range(first), base(common.LAYER))
    rows += on(common.layers(arch, moe=False), common.dense_mlp(arch))
    rows += sparse(arch, range(arch.moe.first_dense_layers, first), common.LAYER)
    rows += common.output(arch, copies=tuple(f"{name}shared_head.head.weight" for name in stored))
    inner = f"{MTP}transformer_layer."
    block = _rows(  # what a multi-token-prediction layer has beside its transformer layer
        MTP, common.HF_LAYER,
        (Replicated, "enorm", "enorm", (hidden,)),
        (Replicated, "hnorm", "hnorm", (hidden,)),
        (ColumnParallel, "eh_proj", "eh_proj", (hidden, 2 * hidden)),
        (Replicated, "final_layernorm", "shared_head.norm", (hidden,)),
    )  # fmt: skip
    rows += on(mtp, [*block, *base(inner)], hf_layer_offset=first)
    return rows + sparse(arch, mtp, inner, first)
