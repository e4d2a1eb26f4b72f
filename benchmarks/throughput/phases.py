"""Where a step's time goes: computation by phase and communication by kind, with the device synchronized around each.

Inside `Profile.recording()` the methods of torch's ProcessGroup, through which every collective of megatron-core and
of this package goes, and megatron-core's forward and backward steps are wrapped; afterwards they are the originals.
What is measured is a step of its own kind: each call is waited for, so nothing overlaps, and ranks meet before a
collective, so that waiting for a late rank and moving bytes are told apart.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_posttrain.platform import platform
from megatron_posttrain.platform.scope import Replacement, replaced
from megatron_posttrain.training import heartbeat

NOTE = (
    "from separate steps with the device synchronized around every call: nothing overlaps, so that these figures do "
    "not add up to a timed step"
)
COMPUTE = ("rollout", "data", "forward", "backward", "optimizer", "refit")  # without communication and waiting
PIPELINE = "pipeline parallel send/receive"
GROUPS = {  # megatron-core's descriptions; other groups: gradient norm, balancing loss, figures for the log
    "TENSOR_MODEL_PARALLEL_GROUP": "tensor parallel",
    "PIPELINE_MODEL_PARALLEL_GROUP": "pipeline parallel",
    "EMBEDDING_GROUP": "pipeline parallel",  # gradients of tied embeddings, between the first and the last stage
    "CONTEXT_PARALLEL_GROUP": "context parallel",
    "EXPERT_MODEL_PARALLEL_GROUP": "expert parallel",
    "EXPERT_TENSOR_PARALLEL_GROUP": "expert parallel",
    "EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP": "expert parallel",
    "DATA_PARALLEL_GROUP": "data parallel",
    "DATA_PARALLEL_GROUP_WITH_CP": "data parallel",
    "EXPERT_DATA_PARALLEL_GROUP": "data parallel",
    "INTRA_PARTIAL_EXPERT_DATA_PARALLEL_GROUP": "data parallel",
}
COLLECTIVES = {  # method: (name, which argument is the whole message)
    "allreduce": ("all-reduce", 0),
    "allreduce_coalesced": ("all-reduce", 0),
    "allgather": ("all-gather", 0),
    "_allgather_base": ("all-gather", 0),
    "all_gather_single": ("all-gather", 0),
    "allgather_into_tensor_coalesced": ("all-gather", 0),
    "all_gather_single_coalesced": ("all-gather", 0),
    "reduce_scatter": ("reduce-scatter", 1),
    "_reduce_scatter_base": ("reduce-scatter", 1),
    "reduce_scatter_single": ("reduce-scatter", 1),
    "reduce_scatter_tensor_coalesced": ("reduce-scatter", 1),
    "reduce_scatter_single_coalesced": ("reduce-scatter", 1),
    "alltoall": ("all-to-all", 1),
    "alltoall_base": ("all-to-all", 1),
    "all_to_all_single": ("all-to-all", 1),
    "broadcast": ("broadcast", 0),
}


@dataclass
class Traffic:
    """One kind of communication on one rank. `seconds` without `waiting_seconds`, except for the pipeline's."""

    calls: int = 0  # collectives, or messages sent
    bytes: float = 0.0  # sent by this rank in a ring, as nccl-tests count for their bus bandwidth
    seconds: float = 0.0
    waiting_seconds: float = 0.0  # for the group's other ranks


class Profile:
    """One rank's. A clock that charges every moment to one phase or kind: they add up to the recorded time."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.traffic: defaultdict[str, Traffic] = defaultdict(Traffic)
        self._stack: list[str] = []
        self._since = 0.0

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """May be entered again: figures add up."""
        with replaced(self._replacements()):
            platform().synchronize()
            self._stack, self._since = ["other"], time.perf_counter()
            yield
            self._charge()

    def result(self, steps: int) -> dict[str, Any]:
        """Means of `steps` recorded steps; `phase_seconds` adds up to `step_seconds`."""
        communication = {
            kind: {name: value / steps for name, value in asdict(traffic).items()}
            for kind, traffic in sorted(self.traffic.items())
        }
        phases = {phase: self.seconds[phase] / steps for phase in COMPUTE if phase in self.seconds}
        phases["collectives"] = sum(f["seconds"] for kind, f in communication.items() if kind != PIPELINE)
        if PIPELINE in communication:
            phases["pipeline"] = communication[PIPELINE]["seconds"]  # with the bubble
        phases["waiting"] = sum(f["waiting_seconds"] for f in communication.values())
        total = sum(self.seconds.values()) / steps
        phases["other"] = total - sum(phases.values())
        return {"step_seconds": total, "phase_seconds": phases, "communication": communication}

    # ---- the clock ---------------------------------------------------------------------------------------------

    def _charge(self) -> float:
        """Up to now to the innermost label; that label's seconds so far."""
        platform().synchronize()
        now = time.perf_counter()
        self.seconds[self._stack[-1]] += now - self._since
        self._since = now
        return self.seconds[self._stack[-1]]

    def _push(self, label: str) -> float:
        self._charge()
        self._stack.append(label)
        return self.seconds[label]

    def _pop(self) -> float:
        seconds = self._charge()
        self._stack.pop()
        return seconds

    def _timed(self, label: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self._push(label)
            try:
                return function(*args, **kwargs)
            finally:
                self._pop()

        return call

    # ---- what is wrapped ---------------------------------------------------------------------------------------

    def _replacements(self) -> Iterator[Replacement]:
        import megatron.core.pipeline_parallel.schedules as schedules

        yield schedules, "forward_step", self._timed("forward", schedules.forward_step)
        yield schedules, "backward_step", self._timed("backward", schedules.backward_step)
        enter, leave = heartbeat.enter, heartbeat.leave  # every PhaseTimer calls them

        def entered(phase: str) -> None:
            enter(phase)
            self._push(phase)

        def left() -> None:
            self._pop()
            leave()

        yield heartbeat, "enter", entered
        yield heartbeat, "leave", left
        for method, facts in COLLECTIVES.items():
            if hasattr(ProcessGroup, method):  # names differ between versions of torch
                yield ProcessGroup, method, self._collective(getattr(ProcessGroup, method), *facts)
        yield ProcessGroup, "send", self._message(ProcessGroup.send, sends=True)
        yield ProcessGroup, "recv", self._message(ProcessGroup.recv, sends=False)
        yield ProcessGroup, "_end_coalescing", self._message(ProcessGroup._end_coalescing, sends=False)

    def _collective(self, original: Callable[..., Any], name: str, whole: int) -> Callable[..., Any]:
        def call(group: ProcessGroup, *args: Any, **kwargs: Any) -> Any:
            if group.size() == 1:
                return original(group, *args, **kwargs)
            kind = f"{GROUPS.get(group.group_desc, 'other')} {name}"
            traffic = self.traffic[kind]
            traffic.calls += 1
            traffic.bytes += bus_bytes(name, _bytes(args[whole]), group.size())
            before = self._push("waiting")
            dist.barrier(group=group)
            traffic.waiting_seconds += self._pop() - before
            before = self._push(kind)
            work = original(group, *args, **kwargs)
            if work is not None:
                work.wait()
            traffic.seconds += self._pop() - before
            return work

        return call

    def _message(self, original: Callable[..., Any], *, sends: bool) -> Callable[..., Any]:
        """Begun as ever, since both neighbours may send at once; timed where it is waited for."""

        def call(group: ProcessGroup, *args: Any) -> Any:
            if sends and not _announces_shape(args[0]):
                self.traffic[PIPELINE].calls += 1
            if sends:
                self.traffic[PIPELINE].bytes += _bytes(args[0])
            work = original(group, *args)
            return None if work is None else _Message(work, self)

        return call

    def wait_for(self, work: Any, *args: Any) -> Any:
        before = self._push(PIPELINE)
        try:
            return work.wait(*args)
        finally:
            self.traffic[PIPELINE].seconds += self._pop() - before


class _Message:
    """A message under way, whose `wait` is timed."""

    def __init__(self, work: Any, profile: Profile) -> None:
        self.wait = partial(profile.wait_for, work)
        self._work = work

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def _announces_shape(tensors: Sequence[Tensor]) -> bool:
    """megatron-core sends [3] sizes ahead of micro-batches of different lengths."""
    return not tensors[0].is_floating_point()


def bus_bytes(name: str, whole: int, size: int) -> float:
    """What every rank of a ring of `size` sends for a message of `whole` bytes (nccl-tests, PERFORMANCE.md)."""
    factor = {"all-reduce": 2 * (size - 1) / size, "broadcast": 1.0}
    return whole * factor.get(name, (size - 1) / size)


def _bytes(tensors: Any) -> int:
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(_bytes(part) for part in tensors)


# Over ranks


def summary(ranks: Sequence[dict[str, Any]], steps: int, stages: Sequence[int]) -> dict[str, Any]:
    """Of every rank's `Profile.result`: mean seconds by phase, communication by kind, and how far ranks differ.

    Args:
        stages: every rank's pipeline stage.
    """
    phases = [rank["phase_seconds"] for rank in ranks]
    kinds = sorted({kind for rank in ranks for kind in rank["communication"]})
    judged = [phase for phase in ("rollout", "forward", "backward") if phase in phases[0]]
    return {
        "note": NOTE,
        "steps": steps,
        "step_seconds": max(rank["step_seconds"] for rank in ranks),
        "phase_seconds": {phase: statistics.fmean(p[phase] for p in phases) for phase in phases[0]},
        "communication": {kind: _kind(kind, [r["communication"].get(kind) for r in ranks]) for kind in kinds},
        "spread": {phase: spread([p[phase] for p in phases], stages) for phase in judged},
        "ranks": list(ranks),
    }


def _kind(kind: str, figures: Sequence[dict[str, float] | None]) -> dict[str, float | None]:
    """Means of the ranks that take part. A pipeline's time is mostly its bubble, which says nothing of a rate."""
    own = [f for f in figures if f is not None]
    mean = {name: statistics.fmean(f[name] for f in own) for name in own[0]}
    rate = None if kind == PIPELINE else mean["bytes"] / mean["seconds"] / 1e9
    return {"ranks": len(own), **mean, "max_seconds": max(f["seconds"] for f in own), "gb_per_second": rate}


def spread(seconds: Sequence[float], stages: Sequence[int]) -> dict[str, float]:
    """Slowest over median, and which rank it is; `within_stage` compares ranks that have the same layers."""
    slowest = max(range(len(seconds)), key=lambda rank: seconds[rank])
    alike = [[s for s, stage in zip(seconds, stages, strict=True) if stage == own] for own in set(stages)]
    return {
        "max_over_median": seconds[slowest] / statistics.median(seconds),
        "slowest_rank": slowest,
        "within_stage": max(max(part) / statistics.median(part) for part in alike),
    }
