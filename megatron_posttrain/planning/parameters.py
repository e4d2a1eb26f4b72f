"""Exact weights, gradients and optimizer state of a rank, as megatron-core 0.16.1 lays them out.

Each model chunk's parameters, in reverse order, lie in one buffer for dense and one for expert parameters
(distributed/param_and_grad_buffer.py). With the distributed optimizer every parameter starts at a multiple of 64
elements, every bucket ends at a multiple of lcm(data parallel size, 128), and each data parallel rank keeps the
optimizer state of its equal share of every bucket, padding excepted.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from megatron_posttrain.models.architecture import Architecture
from megatron_posttrain.parallel.layout import Layout
from megatron_posttrain.planning.flops import Linear, attention_linears, mlp_linears
from megatron_posttrain.planning.layouts import chunk_layers, depth_of, expert_data, stage_kinds

ALIGNMENT = 64  # elements; param_and_grad_buffer.py, _pad_start_of_param_if_needed
BUCKET_MULTIPLE = 128  # elements; _pad_end_of_bucket_if_needed
BUCKET_SIZE = 40_000_000  # elements; of the first stage's first chunk where gradient reduction overlaps


class Parameter(NamedTuple):
    name: str
    elements: int
    expert: bool = False
    shared_embedding: bool = False  # the two copies of a tied embedding get a bucket of their own


@dataclass(frozen=True)
class RankState:
    """What one rank holds. Elements are parameters without padding; the rest are bytes."""

    dense_elements: int
    expert_elements: int
    weights: int
    gradients: int
    optimizer: int


def _linear(parent: str, linear: Linear, tensor: int, expert: bool = False) -> Iterator[Parameter]:
    inputs, outputs = linear.local(tensor)
    yield Parameter(f"{parent}.{linear.name}.weight", inputs * outputs, expert)
    if linear.bias:
        yield Parameter(f"{parent}.{linear.name}.bias", outputs, expert)


def _attention(arch: Architecture, tensor: int, transformer_engine: bool) -> Iterator[Parameter]:
    if arch.attention_sinks:
        yield Parameter("self_attention.core_attention.softmax_offset", arch.num_heads // tensor)
    for linear in attention_linears(arch):
        # Transformer Engine's MLA keeps the down projections whole on every tensor rank.
        whole = transformer_engine and linear.name in ("linear_q_down_proj", "linear_kv_down_proj")
        yield from _linear("self_attention", linear, 1 if whole else tensor)
    if arch.mla is not None:
        if arch.mla.q_rank is not None:
            yield Parameter("self_attention.q_layernorm.weight", arch.mla.q_rank)
        yield Parameter("self_attention.kv_layernorm.weight", arch.mla.kv_rank)
    elif arch.qk_norm:
        yield Parameter("self_attention.q_layernorm.weight", arch.head_dim)
        yield Parameter("self_attention.k_layernorm.weight", arch.head_dim)


def _mlp(arch: Architecture, layer: int, layout: Layout) -> Iterator[Parameter]:
    moe = arch.moe
    if moe is None or not arch.is_moe_layer(layer):
        for linear in mlp_linears(arch, arch.ffn_size):
            yield from _linear("mlp", linear, layout.tensor)
        return
    yield Parameter("mlp.router.weight", moe.num_experts * arch.hidden_size)
    if arch.attention_output_bias or arch.mlp_bias:  # megatron-core's one switch for biases is also the router's
        yield Parameter("mlp.router.bias", moe.num_experts)
    for expert in range(moe.num_experts // layout.expert):
        for linear in mlp_linears(arch, moe.expert_ffn_size):
            yield from _linear(f"mlp.experts.local_experts.{expert}", linear, layout.expert_tensor, expert=True)
    if moe.shared_ffn_size:
        if moe.shared_gate:
            yield Parameter("mlp.shared_experts.gate_weight", arch.hidden_size)
        for linear in mlp_linears(arch, moe.shared_ffn_size):
            yield from _linear("mlp.shared_experts", linear, layout.tensor)


def layer_parameters(arch: Architecture, layer: int, layout: Layout, transformer_engine: bool) -> Iterator[Parameter]:
    """Parameters of one layer on one rank, in the order of megatron-core's `named_parameters`."""
    yield Parameter("input_layernorm.weight", arch.hidden_size)
    yield from _attention(arch, layout.tensor, transformer_engine)
    yield Parameter("pre_mlp_layernorm.weight", arch.hidden_size)
    yield from _mlp(arch, layer, layout)


def chunk_parameters(
    arch: Architecture, layout: Layout, chunk: int, transformer_engine: bool = True
) -> list[Parameter]:
    """Parameters of model chunk `chunk` (of pipeline x virtual_pipeline, in the order of the model) on one rank."""
    chunks = layout.pipeline * layout.chunks
    embedding = math.ceil(arch.vocab_size / layout.tensor) * arch.hidden_size
    tied_apart = arch.tied_embeddings and layout.pipeline > 1
    found: list[Parameter] = []
    if chunk == 0:
        found.append(Parameter("embedding.word_embeddings.weight", embedding, shared_embedding=tied_apart))
    for layer in chunk_layers(depth_of(layout), arch.num_layers)[chunk]:
        for p in layer_parameters(arch, layer, layout, transformer_engine):
            found.append(p._replace(name=f"decoder.layers.{layer}.{p.name}"))
    if chunk == chunks - 1:
        found.append(Parameter("decoder.final_layernorm.weight", arch.hidden_size))
        if not (arch.tied_embeddings and chunk == 0):
            head = arch.hidden_size if arch.scalar_head else embedding
            found.append(Parameter("output_layer.weight", head, shared_embedding=tied_apart))
    return found


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def buckets(
    parameters: Sequence[Parameter], ranks: int, bucket_size: int | None = None
) -> list[tuple[int, int, list[tuple[int, int]]]]:
    """(start, end, parameters' [start, stop)) of the buckets of a buffer, in elements. `ranks` share each equally."""

    groups: list[list[tuple[int, int]]] = []
    start = end = 0
    full = True  # the next parameter begins a bucket
    for p in reversed(parameters):
        if full or p.shared_embedding:
            start = end = _up(end, math.lcm(ranks, BUCKET_MULTIPLE))
            groups.append([])
        at = _up(end, ALIGNMENT)
        end = at + p.elements
        groups[-1].append((at, end))
        full = p.shared_embedding or (bucket_size is not None and end - start >= bucket_size)
    ends = [_up(members[-1][1], math.lcm(ranks, BUCKET_MULTIPLE)) for members in groups]
    return [(start, end, members) for start, end, members in zip([0, *ends], ends, groups, strict=False)]


def rank_state(
    arch: Architecture,
    layout: Layout,
    rank: int,
    *,
    dtype: str = "bf16",
    overlap: bool = True,
    transformer_engine: bool = True,
) -> RankState:
    """Weights, gradients and optimizer state of global rank `rank`, exactly.

    Args:
        dtype: "bf16": fp32 main weights and two fp32 moments a parameter; "fp32": the weights are the main weights.
        overlap: gradient reduction overlaps with the backward pass, which cuts the first chunk into buckets.
        transformer_engine: which layer modules; they differ in MLA's down projections.
    """
    stage = rank // (layout.world_size // layout.pipeline)
    shares = {
        False: (layout.data * layout.context, rank // layout.tensor),
        True: (expert_data(layout), rank // (layout.expert_tensor * layout.expert)),
    }
    elements = {False: 0, True: 0}
    buffered = owned = 0
    for index in range(layout.chunks):
        parameters = chunk_parameters(arch, layout, index * layout.pipeline + stage, transformer_engine)
        size = BUCKET_SIZE if overlap and stage == 0 and index == 0 else None
        for expert, (ranks, at) in shares.items():
            mine = [p for p in parameters if p.expert is expert]
            elements[expert] += sum(p.elements for p in mine)
            for start, end, members in buckets(mine, ranks, size):
                buffered += end - start
                share = (end - start) // ranks
                low = start + at % ranks * share
                owned += sum(max(0, min(stop, low + share) - max(begin, low)) for begin, stop in members)
    weight = 2 if dtype == "bf16" else 4
    state = 12 if dtype == "bf16" else 8
    return RankState(elements[False], elements[True], buffered * weight, buffered * 4, owned * state)


@lru_cache(maxsize=65536)
def _layer_elements(arch: Architecture, layer: int, tensor: int, expert: int, expert_tensor: int) -> tuple[int, int]:
    layout = Layout(tensor=tensor, expert=expert, expert_tensor=expert_tensor)
    sizes = {False: 0, True: 0}
    for p in layer_parameters(arch, layer, layout, transformer_engine=True):
        sizes[p.expert] += _up(p.elements, ALIGNMENT)
    return sizes[False], sizes[True]


@lru_cache(maxsize=65536)
def stage_elements(arch: Architecture, layout: Layout, stage: int) -> tuple[int, int]:
    """(dense, expert) parameters of a pipeline stage's rank with their alignment: what `rank_state` counts, but
    for the padding of buckets, and fast enough for a search."""
    embedding = math.ceil(arch.vocab_size / layout.tensor) * arch.hidden_size
    first, last = stage == 0, stage == layout.pipeline - 1
    head = arch.hidden_size if arch.scalar_head else embedding
    dense = first * embedding + (last and not (first and arch.tied_embeddings)) * head + last * arch.hidden_size
    experts = 0
    for layer, count in stage_kinds(arch, depth_of(layout))[stage]:
        a, b = _layer_elements(arch, layer, layout.tensor, layout.expert, layout.expert_tensor)
        dense, experts = dense + count * a, experts + count * b
    return dense, experts


def trained_elements(arch: Architecture, layout: Layout) -> tuple[int, int]:
    """(dense, expert) parameters of the fullest stage's rank."""
    return max((stage_elements(arch, layout, stage) for stage in range(layout.pipeline)), key=sum)
