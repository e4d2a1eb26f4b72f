"""Memory and time of a workload under a layout, and the ranking of all layouts that training accepts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from megatron_posttrain.errors import UserError
from megatron_posttrain.models.architecture import Architecture
from megatron_posttrain.parallel.layout import Layout, batch_problem, problems, stage_layers
from megatron_posttrain.planning.activations import Shapes, logits_bytes, stage_activations
from megatron_posttrain.planning.flops import flops_per_token, lora_weights
from megatron_posttrain.planning.gpus import Gpu
from megatron_posttrain.planning.layouts import MICRO_BATCHES, enumerate_layouts, expert_data, hard_problem
from megatron_posttrain.planning.parameters import rank_state, stage_elements, trained_elements
from megatron_posttrain.planning.rollout import RolloutPlan, plan_rollout
from megatron_posttrain.planning.step_time import step_time
from megatron_posttrain.planning.workload import Workload

GIB = 2.0**30
LIBRARIES_GIB = 1.5  # NCCL channels, cuBLAS and attention workspaces, allocator fragments
PAGEABLE_BYTES_PER_S = 8e9  # host memory to GPU and back; assumed, not fitted
LOGPROB_PASS = 1 / 3  # GRPO's forward pass for the old log-probs, against forward and backward


@dataclass
class Estimate:
    """One layout's memory (GiB of the fullest rank) and time (seconds of a step), by part."""

    layout: Layout
    micro_batch: int
    recompute: str
    seconds: dict[str, float]
    memory_gib: dict[str, float]
    tokens_per_second_per_gpu: float
    tflops_per_gpu: float
    fits: bool
    rollout_tensor: int = 1
    reason: str = ""
    warnings: list[str] = field(default_factory=list)

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())


def estimate(
    arch: Architecture, layout: Layout, micro_batch: int, recompute: str, work: Workload, gpu: Gpu, exact: bool = False
) -> Estimate:
    """Memory and time of one layout. `exact`: count the padding of gradient buckets too, as a rank holds them."""
    work = replace(work, micro_batch=micro_batch, recompute=recompute)
    if work.lora:
        trained = (max(_adapters(arch, layout, stage, work.lora_rank) for stage in range(layout.pipeline)), 0)
    else:
        trained = trained_elements(arch, layout)
    seconds, _ = step_time(arch, layout, work, gpu, trained)
    rollout = None
    if work.task == "grpo":
        rollout = plan_rollout(arch, layout.world_size, gpu, work)
        for part in ("compute", "exposed_communication", "bubble"):
            seconds[part] *= 1 + LOGPROB_PASS
        seconds |= {"rollout": rollout.seconds, "refit": rollout.refit_seconds}
    memory = _fullest_stage(arch, layout, work, rollout, exact)
    if work.offload:
        seconds["offload"] = 2 * memory["optimizer"] * GIB / PAGEABLE_BYTES_PER_S
    tokens = work.global_batch * work.row_length / layout.world_size / sum(seconds.values())
    flops = flops_per_token(arch, work.row_length, work.lora_rank if work.lora else None)
    return Estimate(
        layout, micro_batch, recompute, seconds, memory, tokens, tokens * flops / 1e12,
        memory["total"] <= gpu.memory_gib, rollout.tensor if rollout else 1,
    )  # fmt: skip


def _fullest_stage(
    arch: Architecture, layout: Layout, work: Workload, rollout: RolloutPlan | None, exact: bool
) -> dict[str, float]:
    """GiB by part."""
    found = []
    for stage in sorted({0, min(1, layout.pipeline - 1), layout.pipeline - 1}):
        memory = _stage_memory(arch, layout, work, stage, exact)
        asleep = 0.0
        if rollout is not None:
            # Generation and training take turns: vLLM sleeps while the activations are there.
            memory |= {"rollout_weights": rollout.weights_bytes, "rollout_cache": rollout.cache_bytes}
            training = memory["activations"] + memory["logits"]
            if work.offload:
                training += memory["optimizer"] + memory["gradients"]
            asleep = min(training, rollout.weights_bytes + rollout.cache_bytes)
        found.append(memory | {"total": sum(memory.values()) - asleep})
    return {name: size / GIB for name, size in max(found, key=lambda memory: memory["total"]).items()}


def _stage_memory(arch: Architecture, layout: Layout, work: Workload, stage: int, exact: bool) -> dict[str, float]:
    """Bytes by part of a stage's first rank."""
    fp8 = work.precision != "bf16"
    tokens = work.micro_batch * work.sequence_length
    shapes = Shapes(tokens, work.sequence_length, fp8=fp8, recompute=work.recompute)
    microbatches = max(1, work.global_batch // work.micro_batch // layout.data)
    dense, experts = stage_elements(arch, layout, stage)
    replicas = layout.data * layout.context
    memory = {
        "weights": 2.0 * (dense + experts),
        "gradients": 4.0 * (dense + experts),
        "optimizer": 12.0 * (dense / replicas + experts / expert_data(layout)),
    }
    if work.lora:
        adapters = _adapters(arch, layout, stage, work.lora_rank)
        memory["weights"] += 2 * adapters
        memory |= {"gradients": 4 * adapters, "optimizer": 12 * adapters / replicas}
    elif exact:
        state = rank_state(arch, layout, stage * (layout.world_size // layout.pipeline))
        memory = {"weights": state.weights, "gradients": state.gradients, "optimizer": state.optimizer}
    if fp8:
        memory["fp8_weights"] = 2.0 * (dense + experts)  # copies of the weights, in both orientations
    memory["activations"] = sum(stage_activations(arch, layout, shapes, stage, microbatches).values())
    memory["logits"] = logits_bytes(arch, layout, shapes) if stage == layout.pipeline - 1 else 0.0
    rows = tokens / layout.context * arch.hidden_size * 2
    gathered = rows if layout.sequence_parallel else 0.0
    routed = 2 * rows / layout.tensor * arch.moe.top_k if arch.moe is not None and layout.expert > 1 else 0.0
    memory["communication"] = LIBRARIES_GIB * GIB + gathered + routed
    return memory


def _adapters(arch: Architecture, layout: Layout, stage: int, rank: int) -> float:
    """LoRA parameters of a stage's rank."""
    layers = sum(stage_layers(layout, arch.num_layers)[stage :: layout.pipeline])
    return layers * lora_weights(arch, rank) / layout.tensor


def check_precision(work: Workload, gpu: Gpu) -> None:
    """Raises UserError where the GPU cannot multiply in the workload's precision."""
    if work.precision != "bf16" and gpu.fp8_tflops is None:
        raise UserError(f"--precision {work.precision}: {gpu.name} has no FP8 (bf16 is allowed)")
    if work.precision == "mxfp8" and not gpu.has_mxfp8:
        raise UserError(f"--precision mxfp8: {gpu.name} has none (bf16 or fp8 are allowed)")


def plan_layout(arch: Architecture, layout: Layout, work: Workload, gpu: Gpu) -> Estimate:
    """The estimate of a given layout, with the best micro batch size where none is given. Raises UserError."""
    check_precision(work, gpu)
    if (problem := hard_problem(layout, arch)) is not None:
        raise UserError(f"--layout {layout}: {problem}")
    recompute = "none" if work.recompute == "auto" else work.recompute
    sizes = [work.micro_batch] if work.micro_batch else MICRO_BATCHES
    found = [
        estimate(arch, layout, size, recompute, work, gpu, exact=True)
        for size in sizes
        if work.global_batch % (size * layout.data) == 0
    ]
    if not found:
        raise UserError(f"--layout {layout}: {batch_problem(layout, work.global_batch, sizes[0])}")
    best = max(found, key=lambda e: (e.fits, e.tokens_per_second_per_gpu))
    best.reason = "the given layout" if best.fits else _does_not_fit(best, gpu)
    best.warnings = layout_warnings(arch, best, work, gpu)
    return best


def plan(arch: Architecture, gpus: int, work: Workload, gpu: Gpu) -> list[Estimate]:
    """Every layout that training accepts, each with its best micro batch size: those that fit first, then by speed.

    Raises UserError when the model and the batch admit no layout at all.
    """
    check_precision(work, gpu)
    ranked = _search(arch, gpus, work, gpu)
    if not ranked:
        raise UserError(
            f"--gpus {gpus}: no layout divides the GPUs, the model and a global batch of {work.global_batch}; "
            "try a batch that is a multiple of a larger power of two"
        )
    best = ranked[0]
    ranked[0] = estimate(arch, best.layout, best.micro_batch, best.recompute, work, gpu, exact=True)
    for other in ranked:
        other.reason = _why_lost(other, ranked[0], gpu)
        other.warnings = layout_warnings(arch, other, work, gpu)
    ranked[0].reason = "the fastest that fits" if ranked[0].fits else _does_not_fit(ranked[0], gpu)
    return ranked


def _search(arch: Architecture, gpus: int, work: Workload, gpu: Gpu) -> list[Estimate]:
    sizes = (work.micro_batch,) if work.micro_batch else MICRO_BATCHES
    best: dict[Layout, Estimate] = {}
    for layout, micro_batch in enumerate_layouts(
        arch, gpus, domain=gpu.group, global_batch=work.global_batch, sequence_length=work.sequence_length,
        micro_batches=sizes,
    ):  # fmt: skip
        for recompute in ("none", "full") if work.recompute == "auto" else (work.recompute,):
            found = estimate(arch, layout, micro_batch, recompute, work, gpu)
            if layout not in best or _order(found) < _order(best[layout]):
                best[layout] = found
            if found.fits:
                break
    return sorted(best.values(), key=_order)


def _order(e: Estimate) -> tuple[bool, float, int]:
    """Among equally fast layouts the one with fewer splits."""
    size = e.layout.model * e.layout.expert * e.layout.chunks
    return (not e.fits, -e.tokens_per_second_per_gpu if e.fits else e.memory_gib["total"], size)


def _does_not_fit(e: Estimate, gpu: Gpu) -> str:
    parts = sorted(((size, name) for name, size in e.memory_gib.items() if name != "total"), reverse=True)
    largest = ", ".join(f"{name} {size:.0f}" for size, name in parts[:2])
    return f"needs {e.memory_gib['total']:.0f} GiB of {gpu.memory_gib:.0f}: {largest}"


def _why_lost(e: Estimate, winner: Estimate, gpu: Gpu) -> str:
    if not e.fits:
        return _does_not_fit(e, gpu)
    if e.recompute != winner.recompute and e.recompute == "full":
        return "fits only with full recomputation"
    more = {name: e.seconds[name] - winner.seconds[name] for name in e.seconds}
    name, seconds = max(more.items(), key=lambda pair: pair[1])
    slower = winner.tokens_per_second_per_gpu / e.tokens_per_second_per_gpu - 1
    return f"{slower:.1%} slower: {seconds:+.2f} s {name.replace('_', ' ')}"


def layout_warnings(arch: Architecture, e: Estimate, work: Workload, gpu: Gpu) -> list[str]:
    """What a user should know before running the layout."""
    layout, found = e.layout, []
    spans = {
        "tensor": layout.tensor,
        "context": layout.tensor * layout.context if layout.context > 1 else 1,
        "expert": layout.expert * layout.expert_tensor,
    }
    for name, span in spans.items():
        if span > gpu.group:
            found.append(
                f"{name} parallel groups span {span} GPUs and cross NVLink domains of {gpu.domain}: "
                f"their traffic goes over the network ({gpu.network_gb_per_s:.0f} GB/s instead of "
                f"{gpu.nvlink_gb_per_s:.0f} a GPU)"
            )
    for problem in problems(layout, arch):
        found.append(f"training refuses this layout: {problem}")
    if (refused := batch_problem(layout, work.global_batch, e.micro_batch)) is not None:
        found.append(f"training refuses this batch: {refused}")
    if e.seconds["bubble"] > 0.25 * e.step_seconds:
        found.append("more than a quarter of the step is pipeline bubble: use more microbatches or fewer stages")
    if e.fits and e.memory_gib["total"] > 0.92 * gpu.memory_gib:
        found.append("less than 8% of the memory is left; set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True")
    if arch.num_mtp_layers:
        found.append("the checkpoint's multi-token-prediction layers are not counted")
    return found


def scaling(arch: Architecture, counts: Iterable[int], work: Workload, gpu: Gpu, grow_batch: bool) -> list[Estimate]:
    """The best layout at each number of GPUs, with the same global batch, or one that grows with the GPUs."""
    counts = list(counts)
    batches = [work.global_batch * gpus // counts[0] if grow_batch else work.global_batch for gpus in counts]
    works = [replace(work, global_batch=batch) for batch in batches]
    return [plan(arch, gpus, job, gpu)[0] for gpus, job in zip(counts, works, strict=True)]
