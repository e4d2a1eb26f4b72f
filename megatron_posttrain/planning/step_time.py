"""Time of a training step: a roofline of ideal seconds by resource, each times a fitted loss.

Every piece of work is counted in seconds that the hardware would need at its peak (`Work`): matrix
multiplications with the padding that their shapes cost, attention, memory traffic of element-wise kernels, a
fixed cost a layer, NVLink and network bytes. A step is the sum over resources of ideal seconds times one
constant each (gpus.Efficiency), so the split of the time is exact by construction and the constants can be
fitted linearly.
"""

from functools import lru_cache

import numpy as np

from megatron_posttrain.models.architecture import Architecture
from megatron_posttrain.parallel.layout import Layout
from megatron_posttrain.planning.flops import (
    Linear,
    attention_dims,
    attention_linears,
    attention_pairs,
    mlp_linears,
    window_of,
)
from megatron_posttrain.planning.gpus import Efficiency, Gpu, constants_of
from megatron_posttrain.planning.layouts import depth_of, expert_data, stage_kinds
from megatron_posttrain.planning.workload import Workload

Work = np.ndarray  # ideal seconds by resource, in the order of RESOURCES
RESOURCES = ("matmul", "grouped_matmul", "attention", "memory", "layers", "nvlink", "network", "data_parallel")
MATMUL, GROUPED, ATTENTION, MEMORY, LAYERS, NVLINK, NETWORK, DATA = range(len(RESOURCES))

FILL = 128  # each dimension d of a bf16 matrix multiplication costs (d + FILL) / d: tile and pipeline fill
FP8_LOSS = 1.1  # FP8 multiplications reach less of their peak: scaling factors, power
ATTENTION_BACKWARD = 2.5  # FlashAttention's backward has 5 matrix multiplications against 2, one recomputed
NATURAL_IMBALANCE = 1.3  # the fullest rank against the mean when no auxiliary force balances the experts
LAUNCHES_OF_MOE = 3  # fixed cost of a mixture-of-experts layer against a dense one
OVERLAP = 0.8  # share of one microbatch's time behind which gradient and parameter traffic can hide
COLLECTIVE_LOSS = 1.25  # large all-gathers and reduce-scatters reach 80% of the links
GRADIENT_TRAFFIC = 6  # bytes a parameter: fp32 gradients reduced, bf16 weights gathered
NEVER_HIDDEN = 0.05  # share of data parallel traffic outside any overlap: first and last bucket
OPTIMIZER_BYTES = 34  # read and written a parameter: gradient, main weight, two moments, clipping, bf16 copy
ROUTED_PASSES = 10  # bytes over tokens x top_k x width: permute, unpermute, probabilities, both directions
GLU_PASSES = {"swiglu": 10, "gpt_oss_glu": 60}  # fused kernel; clamps, sigmoid, bias in separate kernels


def multipliers(e: Efficiency) -> Work:
    """Seconds spent for a second of ideal time, by resource."""
    return np.array([e.matmul, e.grouped_matmul, e.attention, e.memory, e.layer_ms, e.links, e.links, COLLECTIVE_LOSS])


def matmul_seconds(tokens: float, inputs: int, outputs: int, gpu: Gpu, precision: str, count: int = 1) -> float:
    """Ideal seconds of one [tokens, inputs] x [inputs, outputs] product, `count` times: compute or memory bound."""
    low = precision != "bf16"
    peak = (gpu.fp8_tflops if low and gpu.fp8_tflops else gpu.bf16_tflops) * 1e12
    size, fill, loss = (1, 2 * FILL, FP8_LOSS) if low else (2, FILL, 1.0)
    padding = (1 + fill / max(tokens, 1)) * (1 + fill / inputs) * (1 + fill / outputs)
    flops = 2.0 * tokens * inputs * outputs * padding * loss
    traffic = (tokens * inputs + inputs * outputs) * size + tokens * outputs * 2
    return count * max(flops / peak, traffic / (gpu.memory_tb_per_s * 1e12))


@lru_cache(maxsize=65536)
def _layer_work(arch: Architecture, layer: int, split: Layout, job: Workload, gpu: Gpu) -> Work:
    """Forward and backward of one layer and one microbatch on one GPU. `split`: without pipeline and ranks."""
    work = np.zeros(len(RESOURCES))
    length, tp = job.row_length, split.tensor
    tokens = job.micro_batch * length / split.context
    moe = arch.moe if arch.is_moe_layer(layer) else None
    ffn = moe.shared_ffn_size if moe else arch.ffn_size
    traffic = 0.0
    for linear in (*attention_linears(arch), *(mlp_linears(arch, ffn) if ffn else ())):
        work[MATMUL] += _linear(linear, tp, tokens, job, gpu)
        traffic += _cast_bytes(linear, tp, tokens, job)
    query, value = attention_dims(arch)
    pairs = attention_pairs([length], window_of(arch, layer)) / length * tokens
    narrow = max(1.0, 128 * arch.num_heads / value)  # exponentials, not products, bound heads narrower than 128
    forward = 2 * pairs * (query + value) / tp * narrow / (gpu.bf16_tflops * 1e12)
    work[ATTENTION] = forward * (1 + ATTENTION_BACKWARD + (job.recompute != "none"))
    key_value = 2 * arch.key_value_size if arch.mla is None else query + value
    traffic += 2 * (26 * tokens / tp * arch.hidden_size + 9 * tokens * ffn / tp)
    traffic += 16 * tokens / tp * (query + value + 2 * arch.key_value_size)
    gathers = 5 * (1 + bool(ffn)) if tp > 1 else 0  # forward 2, backward 2 and the input gathered again
    work[NVLINK] += gathers * tokens * arch.hidden_size * 2 * (tp - 1) / tp / (gpu.nvlink_gb_per_s * 1e9)
    ring = 3 * tokens * key_value / tp * (split.context - 1)  # keys and values forward, again and back
    if tp * split.context > gpu.group:
        work[NETWORK] += ring / (gpu.network_gb_per_s * 1e9)
    else:
        work[NVLINK] += ring / (gpu.nvlink_gb_per_s * 1e9)
    work[LAYERS] = 1e-3
    if moe:
        traffic += _add_experts(work, arch, split, tokens, job, gpu)
        work[LAYERS] *= LAUNCHES_OF_MOE
    work[MEMORY] = traffic / (gpu.memory_tb_per_s * 1e12)
    if job.recompute == "full":
        work[[MATMUL, GROUPED]] *= 4 / 3 if not job.lora else 3 / 2
        work[[MEMORY, LAYERS, NVLINK, NETWORK]] *= 4 / 3
    return work


def _linear(linear: Linear, tp: int, tokens: float, job: Workload, gpu: Gpu, count: int = 1) -> float:
    inputs, outputs = linear.local(tp)
    passes = 2 if job.lora else 3  # no weight gradient for frozen weights
    return passes * matmul_seconds(tokens, inputs, outputs, gpu, job.precision, count)


def _cast_bytes(linear: Linear, tp: int, tokens: float, job: Workload) -> float:
    """FP8 copies of input and output gradient, in both orientations."""
    return 0.0 if job.precision == "bf16" else 4 * tokens * sum(linear.local(tp))


def _add_experts(work: Work, arch: Architecture, split: Layout, tokens: float, job: Workload, gpu: Gpu) -> float:
    """Adds the experts' products and their dispatch; returns their memory traffic in bytes."""
    moe = arch.moe
    assert moe is not None
    skew = 1.0 if job.balanced else NATURAL_IMBALANCE
    mine = tokens / split.tensor  # dispatch starts from sequence-parallel tokens
    routed = mine * moe.top_k * split.expert_tensor
    local = moe.num_experts // split.expert
    per_expert = routed / local
    traffic = 2 * routed * (ROUTED_PASSES * arch.hidden_size + GLU_PASSES[arch.activation] * moe.expert_ffn_size)
    for linear in mlp_linears(arch, moe.expert_ffn_size):
        work[GROUPED] += skew * _linear(linear, split.expert_tensor, per_expert, job, gpu, local)
        traffic += _cast_bytes(linear, split.expert_tensor, routed, job)
    span = split.expert * split.expert_tensor
    sent = 4 * mine * arch.hidden_size * 2 * skew  # dispatch and combine, both directions, bf16
    work[NVLINK] += sent * _copies(span, moe.top_k) / (gpu.nvlink_gb_per_s * 1e9)
    if span > gpu.group:
        work[NETWORK] += sent * _copies(span // gpu.group, moe.top_k) / (gpu.network_gb_per_s * 1e9)
    return traffic


def _copies(places: int, top_k: int) -> float:
    """Expected number of other places (ranks, nodes) among `places` that a token's `top_k` experts lie on."""
    return (places - 1) * (1 - (1 - 1 / places) ** top_k)


def _stage_work(arch: Architecture, layout: Layout, job: Workload, gpu: Gpu, stage: int) -> Work:
    """One microbatch through all of a stage's layers."""
    work = np.zeros(len(RESOURCES))
    split = Layout(
        tensor=layout.tensor, context=layout.context, expert=layout.expert, expert_tensor=layout.expert_tensor
    )
    for layer, count in stage_kinds(arch, depth_of(layout))[stage]:
        work += count * _layer_work(arch, layer, split, job, gpu)
    tokens = job.micro_batch * job.row_length / layout.context
    if stage == layout.pipeline - 1:
        vocabulary = -(-arch.outputs // layout.tensor)
        work[MATMUL] += (2 if job.lora else 3) * matmul_seconds(tokens, arch.hidden_size, vocabulary, gpu, "bf16")
        work[MEMORY] += 26 * tokens * vocabulary / (gpu.memory_tb_per_s * 1e12)  # loss in fp32, several passes
    return work


def _collective_seconds(size: float, ranks: int, stride: int, gpu: Gpu) -> float:
    """Ideal seconds of an all-gather or reduce-scatter of `size` bytes among `ranks` ranks, `stride` apart."""
    inside = max(1, min(ranks, gpu.group // stride))
    nvlink = size * (inside - 1) / inside / (gpu.nvlink_gb_per_s * 1e9)
    network = size * (1 - inside / ranks) / (inside * gpu.network_gb_per_s * 1e9)
    return nvlink + network


def step_time(
    arch: Architecture, layout: Layout, job: Workload, gpu: Gpu, trained: tuple[float, float]
) -> tuple[dict[str, float], Work]:
    """Seconds of one optimizer step by part, and the ideal seconds by resource that they were made from.

    `trained`: (dense, expert) trainable parameters of the fullest rank.
    """
    losses = multipliers(constants_of(gpu))
    microbatches = job.global_batch // job.micro_batch // layout.data
    kinds = stage_kinds(arch, depth_of(layout))
    distinct = {kind: stage for stage, kind in enumerate(kinds)}.values()
    stages = [_stage_work(arch, layout, job, gpu, s) for s in {*distinct, 0, layout.pipeline - 1}]
    slowest = max(stages, key=lambda work: float(losses @ work))
    if layout.pipeline > 1:
        sent = 4 * job.micro_batch * job.row_length / layout.context / layout.tensor * arch.hidden_size
        link = NETWORK if layout.world_size > gpu.domain else NVLINK
        rate = gpu.network_gb_per_s if link == NETWORK else gpu.nvlink_gb_per_s
        slowest[link] += sent * layout.chunks / (rate * 1e9)
    bubble = (layout.pipeline - 1) / layout.chunks
    optimizer, traffic = _data_parallel(layout, gpu, trained)
    seconds = float(losses @ traffic)
    hidden = OVERLAP * float(losses @ slowest)
    exposed = max(0.0, seconds - hidden) / seconds + NEVER_HIDDEN if seconds else 0.0
    once = slowest * microbatches
    communication = float(losses[NVLINK:] @ (once + exposed * traffic)[NVLINK:])
    parts = {
        "compute": float(losses[:NVLINK] @ once[:NVLINK]),
        "exposed_communication": communication,
        "bubble": bubble * float(losses @ slowest),
        "optimizer": float(losses @ optimizer),
    }
    return parts, once + exposed * traffic + bubble * slowest + optimizer


def _data_parallel(layout: Layout, gpu: Gpu, trained: tuple[float, float]) -> tuple[Work, Work]:
    """(optimizer, gradient and parameter traffic) of a step."""
    optimizer, traffic = np.zeros(len(RESOURCES)), np.zeros(len(RESOURCES))
    groups = (
        (trained[0], layout.data * layout.context, layout.tensor),
        (trained[1], expert_data(layout), layout.expert * layout.expert_tensor),
    )
    for parameters, ranks, stride in groups:
        optimizer[MEMORY] += parameters / ranks * OPTIMIZER_BYTES / (gpu.memory_tb_per_s * 1e12)
        if ranks > 1:
            traffic[DATA] += _collective_seconds(GRADIENT_TRAFFIC * parameters, ranks, stride, gpu)
    return optimizer, traffic
