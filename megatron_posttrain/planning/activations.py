"""Activations: the tensors that autograd keeps between a layer's forward and backward, by name, in bytes.

Two implementations are counted: Transformer Engine's fused kernels on GPUs, and this package's torch modules,
which keep more (fp32 copies in norms, expanded keys and values, unfused activations) and can be measured on any
machine.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from functools import lru_cache

from megatron_posttrain.models.architecture import Architecture
from megatron_posttrain.parallel.layout import Layout
from megatron_posttrain.planning.flops import attention_dims
from megatron_posttrain.planning.layouts import chunk_layers, depth_of, layer_kinds

LOGPROB_CHUNK = 1 << 26  # elements of logits in fp32 at a time, training/token_logprobs.py
# Tensors as wide as an MLP that unfused kernels keep beside gate and up: activated gate, up plus offset and their
# product; gpt-oss clamps both and takes a sigmoid.
UNFUSED = {"swiglu": 3, "gpt_oss_glu": 5}
# Recomputed with the core attention, and inputs of linear modules, which FP8 keeps in one byte.
RECOMPUTED = ("softmax_statistics", "attention_matrix")
FP8_INPUTS = ("attention_input", "mlp_input", "mlp_hidden", "expert_input", "expert_hidden", "shared_hidden")


@dataclass(frozen=True)
class Shapes:
    """What activations depend on. `tokens`: of a micro batch, all its sequences; before context parallelism."""

    tokens: int
    length: int  # of a sequence
    dtype_bytes: int = 2
    fp8: bool = False
    recompute: str = "none"
    transformer_engine: bool = True


def _norm(width: float, shapes: Shapes) -> float:
    """What a norm over `width` elements a token keeps, its output apart."""
    if shapes.transformer_engine:
        return width * shapes.dtype_bytes
    return width * (8 if shapes.dtype_bytes == 4 else 6)  # its input in fp32, and the normalised one


def _attention(arch: Architecture, layout: Layout, shapes: Shapes) -> dict[str, float]:
    """Per token of this rank."""
    e, tp = shapes.dtype_bytes, layout.tensor
    query, value = (x / tp for x in attention_dims(arch))
    kv = arch.key_value_size / tp
    saved: dict[str, float] = {"softmax_statistics": 4 * arch.num_heads / tp}
    if arch.mla is not None:
        return saved | _latent_attention(arch, query, value, shapes)
    if shapes.transformer_engine:
        saved["query_key_value"] = (query + 2 * kv) * e
        saved["query_key_rotated"] = (query + kv) * e
    else:
        saved |= _torch_attention(arch, query, kv, layout.context, shapes)
    saved["attention_output"] = value * e
    if arch.attention_sinks and not shapes.transformer_engine:
        weights = 4 if e == 4 else 4 + e  # in fp32, and as the values are
        saved["attention_matrix"] = (arch.num_heads / tp * weights + 1) * shapes.length
    return saved


def _latent_attention(arch: Architecture, query: float, value: float, shapes: Shapes) -> dict[str, float]:
    """Multi-latent attention, per token."""
    mla, e = arch.mla, shapes.dtype_bytes
    assert mla is not None
    ranks = (mla.q_rank or 0) + mla.kv_rank
    saved = {
        "latents": _norm(ranks, shapes) + (ranks + mla.qk_rope_dim) * e,
        "query_key_value": (2 * query + value) * e + query * e * (mla.q_rank is not None),
        "attention_output": value * e,
    }
    if not shapes.transformer_engine:
        heads = query / (mla.qk_nope_dim + mla.qk_rope_dim)
        saved["rotary_tables"] = 4.0 * mla.qk_rope_dim * e
        saved["query_key_value"] = (2 * query + heads * (mla.qk_nope_dim + mla.v_dim)) * e
        if shapes.recompute == "none":  # torch's plain attention, in fp32, where keys and values differ in width
            saved["query_key_value"] = (2 * query + value) * 4
            saved["attention_matrix"] = 4 * heads * shapes.length
    return saved


def _torch_attention(arch: Architecture, query: float, kv: float, context: int, shapes: Shapes) -> dict[str, float]:
    """Storages behind query, key and value of modules/attention.py, per token."""
    e = shapes.dtype_bytes
    grouped = arch.num_heads > arch.num_query_groups
    kept = shapes.recompute == "none"
    repeated = grouped and kept  # keys and values, one a query head
    gathered = context > 1 and kept  # keys and values of whole sequences, and a mask
    saved = {"query_key_rotated": (query + kv) * e, "rotary_tables": 4.0 * arch.head_dim * e}
    if repeated or gathered:
        saved["query_key_rotated"] = (query + 2 * context * (query if repeated else kv)) * e
    if gathered:
        saved["attention_matrix"] = shapes.length * (e + 1)
    whole = not (repeated or gathered)  # the value is a view of the joint projection
    if arch.qk_norm:
        saved["query_key_norms"] = (query + kv) * (e if e == 4 else 6)
        if e == 4:  # no fp32 copy: the norms keep the projection itself, and the query where it was regrouped
            saved["query_key_norms"] += query * e * grouped
            whole = True
    if whole:
        saved["query_key_value"] = (query + 2 * kv) * e
    return saved


def _mlp(arch: Architecture, layer: int, layout: Layout, shapes: Shapes) -> dict[str, float]:
    """Per token of this rank before sequence parallelism."""
    e, tp = shapes.dtype_bytes, layout.tensor
    fused = shapes.transformer_engine and arch.activation == "swiglu"
    hidden = 1 if fused else UNFUSED[arch.activation]
    moe = arch.moe
    if moe is None or not arch.is_moe_layer(layer):
        width = arch.ffn_size / tp
        return {"gate_up": 2 * width * e, "mlp_hidden": hidden * width * e}
    routed = moe.top_k * layout.expert_tensor / layout.sequence_split  # copies of a token that this rank's experts see
    width = moe.expert_ffn_size / layout.expert_tensor
    saved = {
        "router": (moe.num_experts * 9 + moe.top_k * 24) / layout.sequence_split,
        "expert_input": routed * arch.hidden_size * e,
        "expert_gate_up": routed * 2 * width * e,
        "expert_hidden": routed * (hidden if fused else hidden + 1) * width * e,
    }
    if arch.mlp_bias:
        saved["expert_output"] = routed * arch.hidden_size * e  # before the bias
    if moe.shared_ffn_size:
        saved["shared_gate_up"] = 2 * moe.shared_ffn_size / tp * e
        saved["shared_hidden"] = hidden * moe.shared_ffn_size / tp * e
    return saved


@lru_cache(maxsize=65536)
def _layer_tensors(arch: Architecture, layer: int, split: Layout, shapes: Shapes) -> dict[str, float]:
    """Bytes that one layer keeps for one micro batch on one rank, by tensor. `split`: see `_split`."""
    e, h = shapes.dtype_bytes, arch.hidden_size
    tokens = shapes.tokens / split.context
    if shapes.recompute == "full":
        return {"layer_input": tokens * h * e / split.sequence_split}  # and the rotary table, see stage_activations
    per_token = {
        "attention_norm": _norm(h, shapes) / split.sequence_split,
        "attention_input": h * e / split.sequence_split,
        "mlp_norm": _norm(h, shapes) / split.sequence_split,
        "mlp_input": h * e / split.sequence_split,
        **_attention(arch, split, shapes),
        **_mlp(arch, layer, split, shapes),
    }
    if shapes.fp8:
        per_token |= {name: per_token[name] / 2 for name in FP8_INPUTS if name in per_token}
    left_out = RECOMPUTED if shapes.recompute == "selective" else ()
    return {name: size * tokens for name, size in per_token.items() if name not in left_out}


def _split(layout: Layout) -> Layout:
    """What of a layout the activations of a layer depend on."""
    return Layout(
        tensor=layout.tensor, context=layout.context, expert_tensor=layout.expert_tensor, sequence=layout.sequence
    )


def in_flight(pipeline: int, chunks: int, stage: int, microbatches: int) -> list[int]:
    """Micro batches whose activations each model chunk of `stage` holds at the peak, by chunk.

    One forward, one backward (arXiv 2104.04473): stage s holds pipeline - s. Interleaved: megatron-core's warm-up
    runs (pipeline - s - 1) x 2 + (chunks - 1) x pipeline forward passes, chunk by chunk in groups of `pipeline`.
    """
    if chunks == 1:
        return [min(pipeline - stage, microbatches)]
    passes = min((pipeline - stage - 1) * 2 + (chunks - 1) * pipeline + 1, microbatches * chunks)
    held = [0] * chunks
    for step in range(passes):
        held[step // pipeline % chunks] += 1
    return held


@lru_cache(maxsize=65536)
def _layers_in_flight(arch: Architecture, depth: Layout, stage: int, microbatches: int) -> tuple[tuple[int, int], ...]:
    """(a layer that stands for its kind, how many times a stage holds the activations of such) pairs."""
    counts: Counter[int] = Counter()
    kinds = layer_kinds(arch)
    layers = chunk_layers(depth, arch.num_layers)[stage :: depth.pipeline]
    for chunk, held in zip(layers, in_flight(depth.pipeline, depth.chunks, stage, microbatches), strict=True):
        for layer in chunk:
            counts[kinds[layer]] += held
    return tuple(counts.items())


def stage_activations(
    arch: Architecture, layout: Layout, shapes: Shapes, stage: int, microbatches: int
) -> dict[str, float]:
    """Peak bytes of a stage's rank by tensor: all its layers in flight, the last norm, and with full recomputation
    the layer at work. Logits are apart, see `logits_bytes`."""
    layers = _layers_in_flight(arch, depth_of(layout), stage, microbatches)
    return _activations(arch, _split(layout), shapes, layers, stage == layout.pipeline - 1)


@lru_cache(maxsize=65536)
def _activations(
    arch: Architecture, split: Layout, shapes: Shapes, layers: tuple[tuple[int, int], ...], last: bool
) -> dict[str, float]:
    total: defaultdict[str, float] = defaultdict(float)

    def add(tensors: dict[str, float], times: float = 1.0) -> None:
        for name, size in tensors.items():
            total[name] += times * size

    for layer, count in layers:
        add(_layer_tensors(arch, layer, split, shapes), count)
    if shapes.recompute == "full":
        whole = replace(shapes, recompute="none")
        add(max((_layer_tensors(arch, n, split, whole) for n, _ in layers), key=lambda t: sum(t.values())))
        add({"rotary_tables": shapes.tokens * (arch.mla.qk_rope_dim if arch.mla else arch.head_dim) * 4.0})
    if last:
        per_token = _norm(arch.hidden_size, shapes) + arch.hidden_size * shapes.dtype_bytes
        add({"final_norm": per_token * shapes.tokens / split.context / split.sequence_split})
    return total


def logits_bytes(arch: Architecture, layout: Layout, shapes: Shapes) -> float:
    """Logits of one micro batch on the last stage: themselves, their gradient, and three fp32 chunks at work."""
    elements = shapes.tokens / layout.context * arch.outputs / layout.tensor
    return 2 * elements * shapes.dtype_bytes + 3 * 4 * min(elements, LOGPROB_CHUNK)
