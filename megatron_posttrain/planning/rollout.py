"""Generation with vLLM inside the trainer's ranks: memory and time of a rollout and of the refit after a step."""

from dataclasses import dataclass, replace
from functools import lru_cache

from megatron_posttrain.errors import UserError
from megatron_posttrain.models.architecture import Architecture
from megatron_posttrain.parallel.layout import Layout
from megatron_posttrain.planning.flops import layer_weights, mlp_linears
from megatron_posttrain.planning.gpus import Gpu, constants_of
from megatron_posttrain.planning.parameters import rank_state
from megatron_posttrain.planning.step_time import COLLECTIVE_LOSS
from megatron_posttrain.planning.workload import Workload

ENGINE_GIB = 3.0  # of an engine beside weights and cache, asleep too: graphs, workspaces, compiled kernels; reported
MAX_SEQUENCES = 256  # that run at once on an engine; more of them wait
DECODE_LAYER_SECONDS = 300e-6  # launches, sampling and all-reduces of one layer and one token step
GIB = 2.0**30
REFIT_SECONDS = 2.0  # sleeping, waking and the last synchronisation, whatever the size
TENSOR_SECONDS = 120e-6  # of Python here and in vLLM's loader, a tensor; measured on a CPU


@dataclass(frozen=True)
class RolloutPlan:
    """An engine that a GPU shares with the trainer; bytes are of one GPU."""

    tensor: int
    seconds: float
    weights_bytes: float
    cache_bytes: float  # what `gpu_memory_fraction` leaves, or `needed_bytes` where it is not given
    needed_bytes: float  # of all samples that run at once, at their mean length
    longest_bytes: float  # of one sample of the greatest length


@lru_cache(maxsize=64)
def weight_elements(arch: Architecture) -> int:
    """All parameters but those of multi-token prediction, which training drops."""
    state = rank_state(arch, Layout(), 0)
    return state.dense_elements + state.expert_elements


def cache_bytes_per_token(arch: Architecture, tensor: int = 1, dtype_bytes: int = 2) -> float:
    """Of one rank of an engine. Latent caches are not divided by tensor parallelism, grouped ones down to a group a
    rank. Layers with a sliding window are left out: what they hold is bounded by the window, not by the length."""
    width = 2 * arch.key_value_size if arch.mla is None else arch.mla.kv_rank + arch.mla.qk_rope_dim
    shards = 1 if arch.mla is not None else min(tensor, arch.num_query_groups)
    return float(dtype_bytes) * width / shards * (arch.num_layers - len(arch.sliding_layers))


def rollout_problem(arch: Architecture, gpus: int, tensor: int) -> str | None:
    """Why engines of `tensor` GPUs cannot be made; None where they can."""
    sizes = {"number of GPUs": gpus, "attention heads": arch.num_heads, "MLP width": arch.ffn_size}
    if arch.moe is not None:
        sizes["experts' width"] = arch.moe.expert_ffn_size
    return next((f"{tensor} does not divide the {n} ({size})" for n, size in sizes.items() if size % tensor), None)


@lru_cache(maxsize=256)
def plan_rollouts(arch: Architecture, gpus: int, gpu: Gpu, work: Workload) -> tuple[RolloutPlan, ...]:
    """The engine that the workload asks for, or all that a node's GPUs can hold. `work` counts without what only the
    trainer is concerned with, see `rollout_part`. Raises UserError for a size that does not divide the model."""
    if work.rollout_tensor is not None:
        if problem := rollout_problem(arch, gpus, work.rollout_tensor):
            raise UserError(f"rollout.tensor (--rollout-tensor): {problem}")
        return (_plan_rollout(arch, gpus, gpu, work, work.rollout_tensor),)
    sizes = [1 << k for k in range(min(gpus, gpu.group).bit_length())]
    return tuple(_plan_rollout(arch, gpus, gpu, work, t) for t in sizes if rollout_problem(arch, gpus, t) is None)


def rollout_part(work: Workload) -> Workload:
    """`work` with equal values for whatever a rollout does not depend on."""
    return replace(work, micro_batch=0, recompute="auto", offload=None)


def _plan_rollout(arch: Architecture, gpus: int, gpu: Gpu, work: Workload, tensor: int) -> RolloutPlan:
    """Decoding reads an engine's weights (of the experts that its sequences use) and its cache once a token.

    All samples start together; once the mean length is reached, a quarter of them on average is left for the tail.
    """
    weights = 2.0 * weight_elements(arch)
    batch = max(1.0, work.global_batch / (gpus // tensor))
    per_token = cache_bytes_per_token(arch, tensor)
    e = constants_of(gpu)
    bandwidth = gpu.memory_tb_per_s * 1e12 / e.memory

    def step_seconds(sequences: float, length: float) -> float:
        read = _weights_read(arch, weights, sequences) / tensor + sequences * length * per_token
        active = 2.0 * _active_weights(arch) * sequences / tensor
        return read / bandwidth + active / (gpu.bf16_tflops * 1e12 / e.matmul) + arch.num_layers * DECODE_LAYER_SECONDS

    tail = max(0, work.sequence_length - work.row_length)
    seconds = work.row_length * step_seconds(batch, work.row_length / 2)
    seconds += tail * step_seconds(max(1.0, batch / 4), work.sequence_length)
    needed = min(batch, MAX_SEQUENCES) * work.row_length * per_token
    cache = needed
    if work.kv_cache_gib is not None:
        cache = work.kv_cache_gib * GIB
    elif work.gpu_memory_fraction is not None:
        cache = max(0.0, (work.gpu_memory_fraction * gpu.memory_gib - ENGINE_GIB) * GIB - weights / tensor)
    return RolloutPlan(tensor, seconds, weights / tensor, cache, needed, longest_bytes=work.sequence_length * per_token)


def refit_seconds(arch: Architecture, layout: Layout, gpu: Gpu, rollout: RolloutPlan) -> float:
    """A rank receives what its engine's rank holds; GPUs of a node that hold the same fetch a part each and gather
    (models/shares.py)."""
    copies = max(1, gpu.group // rollout.tensor)
    far = 1 / copies if layout.pipeline > 1 and layout.world_size > gpu.domain else 0.0
    seconds = rollout.weights_bytes * (far / gpu.network_gb_per_s + (1 - far) / gpu.nvlink_gb_per_s) / 1e9
    tensors = 3 * _experts(arch) + 12 * arch.num_layers  # of the Hugging Face directory, about
    return REFIT_SECONDS + seconds * COLLECTIVE_LOSS + TENSOR_SECONDS * tensors


def _experts(arch: Architecture) -> int:
    """Of all layers."""
    return 0 if arch.moe is None else arch.moe.num_experts * sum(map(arch.is_moe_layer, range(arch.num_layers)))


@lru_cache(maxsize=64)
def _active_weights(arch: Architecture) -> int:
    return sum(layer_weights(arch, layer) for layer in range(arch.num_layers))


def _weights_read(arch: Architecture, weights: float, sequences: float) -> float:
    """Bytes of the weights that a step over `sequences` tokens touches."""
    moe = arch.moe
    if moe is None:
        return weights
    experts = 2.0 * _experts(arch) * sum(x.weights for x in mlp_linears(arch, moe.expert_ffn_size))
    used = 1 - (1 - moe.top_k / moe.num_experts) ** sequences
    return weights - experts * (1 - used)
