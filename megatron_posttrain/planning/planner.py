"""Memory and time of a workload under a layout, and the ranking of all layouts that training accepts."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

from megatron_posttrain.errors import UserError
from megatron_posttrain.models.architecture import Architecture
from megatron_posttrain.models.layout_checks import problems
from megatron_posttrain.parallel.layout import Layout, batch_problem
from megatron_posttrain.planning import layouts
from megatron_posttrain.planning.activations import Shapes, logits_bytes, stage_activations
from megatron_posttrain.planning.flops import Linear, adapter_weights, flops_per_token, layer_linears
from megatron_posttrain.planning.gpus import Gpu
from megatron_posttrain.planning.parameters import rank_state, stage_elements, trained_elements
from megatron_posttrain.planning.rollout import ENGINE_GIB, GIB, RolloutPlan, plan_rollouts, refit_seconds, rollout_part
from megatron_posttrain.planning.step_time import step_time
from megatron_posttrain.planning.workload import Workload

LIBRARIES_GIB = 0.75  # cuBLAS and attention workspaces, compiled kernels
# A communicator of NCCL 2.29.7 takes 390 MiB on an H100 for one rank (benchmarks/results/h100_1_gpu.md); 512 and more
# were reported for several ranks. megatron-core's groups of the same ranks have one each.
COMMUNICATOR_GIB = 0.5
ENGINE_COMMUNICATORS = 2
ALLOCATOR_SHARE = 0.02  # of what is allocated for good: 6 MiB shards of optimizer states lie in 20 MiB segments
PAGEABLE_BYTES_PER_S = 8e9  # host memory to GPU and back; assumed, not fitted
NF4_BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8  # of a weight in NF4 with double quantisation
SPARE = 0.1  # of a GPU's memory: what is estimated here varies by so much
LOGPROB_PASS = 1 / 3  # GRPO's forward pass for the old log-probs, against forward and backward


@dataclass
class Estimate:
    """One layout's memory (GiB of the fullest rank) and time (seconds of a step), by part. The time is found when it is
    asked for: of the many layouts that do not fit only the one that lacks least is shown."""

    layout: Layout
    micro_batch: int
    recompute: str
    timed: Callable[[], dict[str, float]]
    memory_gib: dict[str, float]
    tokens: float  # of a step, a GPU
    flops_per_token: float
    fits: bool
    rollout: RolloutPlan | None = None
    offload: bool = False
    reason: str = ""
    warnings: list[str] = field(default_factory=list)

    @cached_property
    def seconds(self) -> dict[str, float]:
        return self.timed()

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def tokens_per_second_per_gpu(self) -> float:
        return self.tokens / self.step_seconds

    @property
    def tflops_per_gpu(self) -> float:
        return self.tokens_per_second_per_gpu * self.flops_per_token / 1e12


def estimate(
    arch: Architecture, layout: Layout, micro_batch: int, recompute: str, work: Workload, gpu: Gpu, exact: bool = False
) -> Estimate:
    """Memory and time of one layout. `exact`: count the padding of gradient buckets too, as a rank holds them."""
    count, arch = work.sequences, work.trained(arch)
    work = replace(work, micro_batch=count * micro_batch, global_batch=count * work.global_batch, recompute=recompute)
    stages = sorted({0, min(1, layout.pipeline - 1), layout.pipeline - 1})
    memories = [_stage_memory(arch, layout, work, stage, exact) for stage in stages]
    if work.rollouts:
        memories = [m | {"engine": (ENGINE_GIB + ENGINE_COMMUNICATORS * COMMUNICATOR_GIB) * GIB} for m in memories]
    tokens = work.global_batch * work.row_length / layout.world_size
    flops = flops_per_token(arch, work.row_length, work.rank if work.lora else None)

    def of(rollout: RolloutPlan | None, offload: bool) -> Estimate:
        memory = max((_with_engine(m, rollout, offload) for m in memories), key=lambda m: m["total"])

        def timed() -> dict[str, float]:
            times = dict(_training_seconds(arch, layout, work, gpu))
            if rollout is not None:
                times |= {"rollout": rollout.seconds, "refit": refit_seconds(arch, layout, gpu, rollout)}
            if work.task == "dpo":  # each row once; no memory, for its log-probs are kept
                times["reference"] = LOGPROB_PASS * _passes(times)
            if (critic := work.critic(arch)) is not None:  # values before the update, and an update
                theirs, _ = step_time(critic, layout, work, gpu, trained_elements(critic, layout))
                times["critic"] = theirs["optimizer"] + (1 + LOGPROB_PASS) * _passes(theirs)
            elif work.beside is not None:
                times["teacher"] = LOGPROB_PASS * _passes(step_time(work.beside, layout, work, gpu, (0, 0))[0])
            if offload:
                moved = memory["optimizer"] + memory.get("critic_optimizer", 0.0)
                times["offload"] = 2 * moved / PAGEABLE_BYTES_PER_S
            return times

        gib = {name: size / GIB for name, size in memory.items()}
        fits = _fits(memory["total"], rollout, gpu)
        return Estimate(layout, micro_batch, recompute, timed, gib, tokens, flops, fits, rollout, offload)

    if not work.rollouts:
        return of(None, False)
    rollouts = plan_rollouts(arch, layout.world_size, gpu, rollout_part(work))
    offloads = (False, True) if work.offload is None else (work.offload,)
    phases = [_phases(memories, offload) for offload in offloads]
    options = {
        (rollout, offload): max(training, generating + (rollout.weights_bytes + rollout.cache_bytes))
        for rollout in rollouts
        for offload, (training, generating) in zip(offloads, phases, strict=True)
    }
    fitting = [of(*option) for option, total in options.items() if _fits(total, option[0], gpu)]
    return min(fitting, key=_order) if fitting else of(*min(options, key=lambda option: options[option]))


def _fits(total: float, rollout: RolloutPlan | None, gpu: Gpu) -> bool:
    return total / GIB <= gpu.memory_gib and (rollout is None or rollout.cache_bytes >= rollout.longest_bytes)


@lru_cache(maxsize=1)  # of the layout's options
def _training_seconds(arch: Architecture, layout: Layout, work: Workload, gpu: Gpu) -> dict[str, float]:
    """Of a step by part, an engine's apart."""
    if work.lora:
        trained = max((_adapters(arch, layout, stage, work.rank) for stage in range(layout.pipeline)), key=sum)
    else:
        trained = trained_elements(arch, layout)
    times, _ = step_time(arch, layout, work, gpu, trained)
    if work.rollouts:
        times |= {part: times[part] * (1 + LOGPROB_PASS) for part in ("compute", "exposed_communication", "bubble")}
    return times


def _phases(memories: Sequence[dict[str, float]], offload: bool) -> tuple[float, float]:
    """Bytes of the fullest stage while it trains, and while an engine generates, that one's weights and cache apart."""
    training, generating = [], []
    for memory in memories:
        passing, states = memory["activations"] + memory["logits"], memory["optimizer"]
        kept = sum(memory.values()) - passing - states
        training.append(kept + (max(passing, states) if offload else passing + states))  # back for the optimizer's step
        given_back = sum(memory.get(name, 0.0) for name in ("gradients", "critic_gradients", "critic_optimizer"))
        generating.append(kept + (-given_back if offload else states))
    return max(training), max(generating)


def _passes(seconds: dict[str, float]) -> float:
    """Forward and backward."""
    return seconds["compute"] + seconds["exposed_communication"] + seconds["bubble"]


def _with_engine(memory: dict[str, float], rollout: RolloutPlan | None, offload: bool) -> dict[str, float]:
    """Bytes by part, and `total`: of the fuller phase where the trainer and an engine take turns."""
    if rollout is None:
        return memory | {"total": sum(memory.values())}
    training, generating = _phases([memory], offload)
    awake = {"rollout_weights": rollout.weights_bytes, "rollout_cache": rollout.cache_bytes}
    return memory | awake | {"total": max(training, generating + sum(awake.values()))}


def _communicators(layout: Layout) -> int:
    """Groups of more than one rank that the trainer's collectives run on, as counted on eight ranks."""
    sizes = {
        "world": (layout.world_size, 1),
        "data": (layout.data * layout.context, 3),  # with context, without, and the optimizer's
        "tensor": (layout.tensor, 2),  # with context and without
        "context": (layout.context, 1),
        "pipeline": (layout.pipeline, 2),  # and the tied embeddings'
        "expert": (layout.expert * layout.expert_tensor, 2),  # with expert tensor and without
        "expert data": (layouts.expert_data(layout), 1 if layout.expert > 1 else 0),
    }
    return sum(count for size, count in sizes.values() if size > 1)


def _stage_memory(arch: Architecture, layout: Layout, work: Workload, stage: int, exact: bool) -> dict[str, float]:
    """Bytes by part of a stage's first rank."""
    fp8 = work.precision != "bf16"
    tokens = work.micro_batch * work.sequence_length
    last, shapes = stage == layout.pipeline - 1, Shapes(tokens, work.sequence_length, fp8=fp8, recompute=work.recompute)
    microbatches = max(1, work.global_batch // work.micro_batch // layout.data)
    memory = _states(arch, layout, stage, exact)
    if work.lora:
        adapters = _adapters(arch, layout, stage, work.rank)
        states = adapters[0] / (layout.data * layout.context) + adapters[1] / layouts.expert_data(layout)
        memory["weights"] = 2.0 * sum(stage_elements(arch, layout, stage)) + 2 * sum(adapters)
        if work.quantization is not None:
            linears = sum(_of_linears(arch, layout, stage, lambda linear, tensor: math.prod(linear.local(tensor))))
            layers = sum(count for _, count in layouts.stage_kinds(arch, layouts.depth_of(layout))[stage])
            memory["weights"] -= (2 - NF4_BYTES) * linears
            memory["dequantised"] = 2 * linears / max(1, layers)  # one layer at a time
        memory |= {"gradients": 4 * sum(adapters), "optimizer": 12 * states}
    if fp8:  # copies of the weights, in both orientations
        memory["fp8_weights"] = 2.0 * sum(stage_elements(arch, layout, stage))
    memory["activations"] = sum(stage_activations(arch, layout, shapes, stage, microbatches).values())
    memory["logits"] = logits_bytes(arch, layout, shapes) if last else 0.0
    if (critic := work.critic(arch)) is not None:
        memory |= {f"critic_{name}": size for name, size in _states(critic, layout, stage, exact).items()}
        if fp8:
            memory["fp8_weights"] += 2.0 * sum(stage_elements(critic, layout, stage))
        theirs = sum(stage_activations(critic, layout, shapes, stage, microbatches).values())
        memory["activations"] = max(memory["activations"], theirs - memory["logits"])  # one is trained after the other
    elif work.beside is not None:
        memory["teacher"] = 2.0 * sum(stage_elements(work.beside, layout, stage))
        if last:
            # Its last hidden states of a whole step, and its logits beside the student's.
            of_step = microbatches * tokens / layout.context
            memory["teacher"] += 2.0 * of_step * work.beside.hidden_size
            memory["logits"] += logits_bytes(work.beside, layout, shapes)
    rows = tokens / layout.context * arch.hidden_size * 2
    gathered = rows if layout.sequence_parallel else 0.0
    routed = 2 * rows / layout.tensor * arch.moe.top_k if arch.moe is not None and layout.expert > 1 else 0.0
    lasting = sum(size for name, size in memory.items() if name.endswith(("weights", "gradients", "optimizer")))
    memory["allocator"] = ALLOCATOR_SHARE * (lasting - memory.get("fp8_weights", 0.0))
    libraries = LIBRARIES_GIB + COMMUNICATOR_GIB * _communicators(layout)
    memory["communication"] = libraries * GIB + gathered + routed
    return memory


def _states(arch: Architecture, layout: Layout, stage: int, exact: bool) -> dict[str, float]:
    """Bytes of a trained model on a stage's first rank."""
    if exact:
        state = rank_state(arch, layout, stage * (layout.world_size // layout.pipeline))
        return {"weights": state.weights, "gradients": state.gradients, "optimizer": state.optimizer}
    dense, experts = stage_elements(arch, layout, stage)
    states = dense / (layout.data * layout.context) + experts / layouts.expert_data(layout)
    return {"weights": 2.0 * (dense + experts), "gradients": 4.0 * (dense + experts), "optimizer": 12.0 * states}


def _adapters(arch: Architecture, layout: Layout, stage: int, rank: int) -> tuple[float, float]:
    """LoRA parameters of a stage's rank: dense, and of its experts."""
    return _of_linears(arch, layout, stage, lambda linear, tensor: adapter_weights(linear, rank, tensor))


def _of_linears(
    arch: Architecture, layout: Layout, stage: int, size: Callable[[Linear, int], float]
) -> tuple[float, float]:
    """Sums of `size`(layer, tensor ranks) over the linear layers of a stage's rank: dense, and of its experts."""
    held = arch.moe.num_experts / layout.expert if arch.moe is not None else 0
    dense, experts = 0.0, 0.0
    for layer, count in layouts.stage_kinds(arch, layouts.depth_of(layout))[stage]:
        for linear, of_expert in layer_linears(arch, layer):
            if of_expert:
                experts += count * held * size(linear, layout.expert_tensor)
            else:
                dense += count * size(linear, layout.tensor)
    return dense, experts


def check_precision(work: Workload, gpu: Gpu) -> None:
    """Raises UserError where the GPU cannot multiply in the workload's precision."""
    if work.precision != "bf16" and gpu.fp8_tflops is None:
        raise UserError(f"--precision {work.precision}: {gpu.name} has no FP8 (bf16 is allowed)")
    if work.precision == "mxfp8" and not gpu.has_mxfp8:
        raise UserError(f"--precision mxfp8: {gpu.name} has none (bf16 or fp8 are allowed)")


def plan_layout(arch: Architecture, layout: Layout, work: Workload, gpu: Gpu) -> Estimate:
    """The estimate of a given layout, with the best micro batch size where none is given. Raises UserError."""
    check_precision(work, gpu)
    # Cut key-value heads, which training refuses, still have a memory and a time
    for problem in problems(layout, replace(arch, num_query_groups=arch.num_heads)):
        raise UserError(f"--layout {layout}: {problem}")
    sizes = _micro_batches(work)
    possible = [size for size in sizes if work.global_batch % (size * layout.data) == 0]
    cases = itertools.product(possible, _recomputes(work))
    found = [estimate(arch, layout, size, recompute, work, gpu, exact=True) for size, recompute in cases]
    if not found:
        raise UserError(f"--layout {layout}: {batch_problem(layout, work.global_batch, sizes[0])}")
    best = min(found, key=_order)
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
    tight = ranked[0].memory_gib["total"] > (1 - SPARE) * gpu.memory_gib
    fastest = "the fastest that fits" + (", with little to spare" if tight else "")
    ranked[0].reason = fastest if ranked[0].fits else _does_not_fit(ranked[0], gpu)
    return ranked


def _micro_batches(work: Workload) -> Sequence[int]:
    return (work.micro_batch,) if work.micro_batch else layouts.MICRO_BATCHES


def _recomputes(work: Workload) -> tuple[str, ...]:
    return ("none", "full") if work.recompute == "auto" else (work.recompute,)


def _search(arch: Architecture, gpus: int, work: Workload, gpu: Gpu) -> list[Estimate]:
    """One estimate of every split: layouts that differ in their virtual pipeline alone are one."""
    best: dict[Layout, Estimate] = {}
    for layout, micro_batch in layouts.enumerate_layouts(
        arch, gpus, domain=gpu.group, global_batch=work.global_batch, sequence_length=work.sequence_length,
        micro_batches=_micro_batches(work),
    ):  # fmt: skip
        split = replace(layout, virtual_pipeline=None)
        for recompute in _recomputes(work):
            found = estimate(arch, layout, micro_batch, recompute, work, gpu)
            if split not in best or _order(found) < _order(best[split]):
                best[split] = found
            if found.fits and not work.rollouts:  # there, recomputation may spare an offload
                break
    return sorted(best.values(), key=_order)


def _order(e: Estimate) -> tuple[bool, float, int]:
    """Among equally fast layouts the one with fewer splits."""
    size = e.layout.model * e.layout.expert * e.layout.chunks
    return (not e.fits, -e.tokens_per_second_per_gpu if e.fits else e.memory_gib["total"], size)


def _does_not_fit(e: Estimate, gpu: Gpu) -> str:
    if e.memory_gib["total"] <= gpu.memory_gib and e.rollout is not None:
        return (
            f"vLLM's cache has {e.rollout.cache_bytes / GIB:.1f} GiB a GPU, one sequence needs "
            f"{e.rollout.longest_bytes / GIB:.1f}: raise rollout.gpu_memory_fraction or rollout.tensor"
        )
    parts = sorted(((size, name) for name, size in e.memory_gib.items() if name != "total"), reverse=True)
    largest = ", ".join(f"{name} {size:.0f}" for size, name in parts[:2])
    return f"needs {e.memory_gib['total']:.0f} GiB of {gpu.memory_gib:.0f}: {largest}"


def _why_lost(e: Estimate, winner: Estimate, gpu: Gpu) -> str:
    if not e.fits:
        return _does_not_fit(e, gpu)
    if e.recompute != winner.recompute and e.recompute == "full":
        return "fits only with full recomputation"
    names = e.seconds | winner.seconds
    more = {name: e.seconds.get(name, 0.0) - winner.seconds.get(name, 0.0) for name in names}
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
    if e.fits and e.memory_gib["total"] > (1 - SPARE) * gpu.memory_gib:
        # vLLM's custom all-reduce cannot share memory of expandable segments between its GPUs.
        advice = "" if e.rollout else "; set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"
        found.append(f"less than {SPARE:.0%} of the memory is left{advice}")
    if e.rollout is not None and e.rollout.cache_bytes < e.rollout.needed_bytes:
        found.append(
            f"vLLM's cache has {e.rollout.cache_bytes / GIB:.1f} GiB a GPU, the samples in flight need "
            f"{e.rollout.needed_bytes / GIB:.1f}: some will wait; raise rollout.gpu_memory_fraction"
        )
    if arch.num_mtp_layers:
        found.append("the checkpoint's multi-token-prediction layers are not counted")
    return found


def scaling(arch: Architecture, counts: Sequence[int], work: Workload, gpu: Gpu, grow_batch: bool) -> list[Estimate]:
    """The best layout at each number of GPUs, with the same global batch, or one that grows with the GPUs."""
    batches = [work.global_batch * gpus // counts[0] if grow_batch else work.global_batch for gpus in counts]
    pairs = zip(counts, batches, strict=True)
    return [plan(arch, gpus, replace(work, global_batch=batch), gpu)[0] for gpus, batch in pairs]
