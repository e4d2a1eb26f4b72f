"""Generation with vLLM inside the trainer's ranks: memory and time of a rollout and of the refit after a step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from megatron_posttrain.models.architecture import Architecture
from megatron_posttrain.parallel.layout import Layout
from megatron_posttrain.planning.flops import layer_weights
from megatron_posttrain.planning.gpus import Gpu, constants_of
from megatron_posttrain.planning.layers import mlp_linears
from megatron_posttrain.planning.parameters import rank_state
from megatron_posttrain.planning.workload import Workload

WEIGHTS_SHARE = 0.45  # of a GPU's memory at most for an engine's weights; the trainer's state needs the rest
DECODE_LAYER_SECONDS = 300e-6  # launches, sampling and all-reduces of one layer and one token step
REFIT_SECONDS = 2.0  # sleeping, waking and the last synchronisation, whatever the size


@dataclass(frozen=True)
class RolloutPlan:
    tensor: int
    seconds: float
    refit_seconds: float
    weights_bytes: float  # a GPU
    cache_bytes: float  # a GPU, for all samples of an engine at their mean length


@lru_cache(maxsize=64)
def weight_elements(arch: Architecture) -> int:
    """All parameters but those of multi-token prediction, which training drops."""
    state = rank_state(arch, Layout(), 0)
    return state.dense_elements + state.expert_elements


def _cache_bytes_per_token(arch: Architecture) -> float:
    width = 2 * arch.key_value_size if arch.mla is None else arch.mla.kv_rank + arch.mla.qk_rope_dim
    return 2.0 * width * arch.num_layers


def plan_rollout(arch: Architecture, gpus: int, gpu: Gpu, work: Workload) -> RolloutPlan:
    """Decoding reads an engine's weights (of the experts that its sequences use) and its cache once a token.

    All samples start together; once the mean length is reached, a quarter of them on average is left for the tail.
    """
    weights = 2.0 * weight_elements(arch)
    tensor = work.rollout_tensor or 1
    while work.rollout_tensor is None and weights / tensor > WEIGHTS_SHARE * gpu.memory_gib * 2**30 and tensor < gpus:
        tensor *= 2
    batch = max(1.0, work.global_batch / (gpus // tensor))
    per_token = _cache_bytes_per_token(arch)
    # Latent caches are not divided by tensor parallelism, grouped ones down to a group a rank.
    shards = 1 if arch.mla is not None else min(tensor, arch.num_query_groups)
    e = constants_of(gpu)
    bandwidth = gpu.memory_tb_per_s * 1e12 / e.memory

    def step_seconds(sequences: float, length: float) -> float:
        read = _weights_read(arch, weights, sequences) / tensor + sequences * length * per_token / shards
        active = 2.0 * sum(layer_weights(arch, n) for n in range(arch.num_layers)) * sequences / tensor
        return read / bandwidth + active / (gpu.bf16_tflops * 1e12 / e.matmul) + arch.num_layers * DECODE_LAYER_SECONDS

    tail = max(0, work.sequence_length - work.row_length)
    seconds = work.row_length * step_seconds(batch, work.row_length / 2)
    seconds += tail * step_seconds(max(1.0, batch / 4), work.sequence_length)
    inside = gpus <= gpu.domain
    rate = (gpu.nvlink_gb_per_s if inside else gpu.network_gb_per_s) * 1e9
    refit = REFIT_SECONDS + weights / tensor / rate / 0.5
    return RolloutPlan(tensor, seconds, refit, weights / tensor, batch * work.row_length * per_token / shards)


def _weights_read(arch: Architecture, weights: float, sequences: float) -> float:
    """Bytes of the weights that a step over `sequences` tokens touches."""
    moe = arch.moe
    if moe is None:
        return weights
    layers = sum(arch.is_moe_layer(n) for n in range(arch.num_layers))
    experts = 2.0 * layers * moe.num_experts * sum(x.weights for x in mlp_linears(arch, moe.expert_ffn_size))
    used = 1 - (1 - moe.top_k / moe.num_experts) ** sequences
    return weights - experts * (1 - used)
