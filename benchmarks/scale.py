"""What starting, saving and refitting cost as ranks are added, counted from the code: no cluster is needed.

    python -m benchmarks.scale [--ranks 8,64,512,4096]

Every figure is of the code that runs, with the figure of the version before it (commit 1fc04ac) in front: groups are
made by megatron-core's own `initialize_model_parallel` under a recording `new_group`, nodes sign in with the real
`RollCall` on a counting store, memory and bytes follow from the planner's exact shards. One cost is measured here,
the time of a request to a TCPStore on this machine. Nothing is said about a network or a GPU.
"""

from __future__ import annotations

import argparse
import bisect
import itertools
import math
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "launch"))

import roll_call
import torch
import torch.distributed as dist

from megatron_posttrain.models import registry
from megatron_posttrain.models.architecture import Architecture
from megatron_posttrain.models.shares import Box, Schedule, Slot
from megatron_posttrain.models.weights import QKV, Replicated, Vocabulary
from megatron_posttrain.parallel.layout import Layout, stage_layers
from megatron_posttrain.planning.known_models import KNOWN_MODELS
from megatron_posttrain.planning.layouts import expert_data
from megatron_posttrain.planning.parameters import rank_state
from megatron_posttrain.training.heartbeat import WRITE_EVERY, WRITES_PER_S

MODELS: dict[str, dict[str, Any]] = {
    "Qwen3-30B-A3B": {"tensor": 2, "expert": 8},
    "Qwen3-235B-A22B": {"tensor": 4, "pipeline": 4, "expert": 8},
}
NODE = 8  # ranks
QWEN, DEEPSEEK = {"tensor": 4, "pipeline": 4, "expert": 8}, {"pipeline": 4, "expert": 64}
REFITS: list[tuple[str, dict[str, Any], int, int, bool]] = [
    ("Qwen3-30B-A3B", MODELS["Qwen3-30B-A3B"], 8, 1, False),
    ("Qwen3-235B-A22B", QWEN, 64, 8, False),
    ("Qwen3-235B-A22B", QWEN, 64, 8, True),
    ("Qwen3-235B-A22B", QWEN, 64, 16, True),
    ("DeepSeek-V3", DEEPSEEK, 256, 16, False),
    ("DeepSeek-V3", DEEPSEEK, 256, 32, True),
]
OPTIMIZER, WEIGHTS = 12.0, 2.0  # bytes a parameter
BASE_FILES = 60  # of a rank before any group: libraries, logs, its store


class CountingStore:
    """The part of a TCPStore that a roll call uses, shared by threads; counts requests."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.requests = 0
        self.lock = threading.Condition()

    def set(self, key: str, value: str) -> None:
        with self.lock:
            self.requests += 1
            self.values[key] = value
            self.lock.notify_all()

    def get(self, key: str) -> bytes:
        with self.lock:
            self.requests += 1
            self.lock.wait_for(lambda: key in self.values)
            return self.values[key].encode()

    def check(self, keys: list[str]) -> bool:
        with self.lock:
            self.requests += 1
            return all(key in self.values for key in keys)

    def add(self, key: str, amount: int) -> int:
        with self.lock:
            self.requests += 1
            self.values[key] = str(int(self.values.get(key, "0")) + amount)
            self.lock.notify_all()
            return int(self.values[key])


def roll_call_requests(nodes: int) -> int:
    """Of all nodes together, from signing in to the end, as threads of this process."""
    store = CountingStore()

    class Counted(roll_call.RollCall):
        def _serve_or_join(self) -> Any:
            return store

    def node(rank: int) -> None:
        card = roll_call.Card("h", rank, "run", nodes, NODE, "sft", "v")
        call = Counted(card, "h", 1, join_timeout=60.0, stopped=lambda: False)
        call.report(0, "", failed=False)
        while call.reported() < nodes:
            time.sleep(2 * call.patience)
        if call.serves:
            call.outcomes()

    threads = [threading.Thread(target=node, args=(rank,)) for rank in range(nodes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return store.requests


@dataclass(frozen=True)
class Group:
    """What megatron-core asks a group for while it makes others."""

    ranks: int

    def size(self) -> int:
        return self.ranks

    def rank(self) -> int:
        return 0


def gloo_groups(layout: Layout, *, made: bool) -> list[int]:
    """Sizes of the gloo groups of rank 0; `made`: megatron-core makes its own."""
    from megatron.core import parallel_state as ps

    sizes: list[int] = []

    def new_group(ranks: Sequence[int], backend: str | None = None, **unused: Any) -> Any:
        if backend == "gloo" and 0 in ranks:
            sizes.append(len(ranks))
        return Group(len(ranks))

    with (
        patch.object(dist, "new_group", new_group),
        patch.object(dist, "is_initialized", lambda: True),
        patch.object(dist, "get_world_size", lambda group=None: layout.world_size),
        patch.object(dist, "get_rank", lambda group=None: 0),
    ):
        ps.initialize_model_parallel(
            layout.tensor, layout.pipeline, expert_model_parallel_size=layout.expert, create_gloo_process_groups=made,
            expert_tensor_parallel_size=layout.expert_tensor,
        )  # fmt: skip
        ps.destroy_model_parallel()
    return sizes


def seconds_a_request() -> float:
    """A `get` of a small value from a TCPStore of this machine by one client."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    store.set("key", "value")
    count, start = 5000, time.perf_counter()
    for _ in range(count):
        store.get("key")
    return (time.perf_counter() - start) / count


@dataclass
class Costs:
    """Of a model on a number of ranks: (before, now)."""

    store_requests: tuple[float, float]
    open_files: tuple[float, float]  # of a rank
    save_gb: tuple[float, float]  # host memory of a rank
    writers: tuple[float, float]  # ranks that write a checkpoint
    start_tb: tuple[float, float]  # read of the Hugging Face directory, by all ranks, trainer and vLLM
    resume_tb: tuple[float, float]  # read of a checkpoint, by all ranks
    heartbeats: tuple[float, float]  # writes a second
    failure_reads: tuple[float, float]  # of heartbeats when all ranks fail together


def costs(name: str, ranks: int, calls: dict[int, int]) -> Costs:
    arch, layout = KNOWN_MODELS[name], Layout(world_size=ranks, **MODELS[name])
    state, whole = rank_state(arch, layout, 0), rank_state(arch, Layout(), 0)
    shard = state.dense_elements + state.expert_elements
    own = state.dense_elements / layout.data + state.expert_elements / expert_data(layout)
    model = whole.dense_elements + whole.expert_elements
    before, now = gloo_groups(layout, made=True), gloo_groups(layout, made=False)
    # Every rank asks for every other's address and waits for it, in vLLM's world group too; lazily connected: nobody.
    mesh = sum(2 * n * ranks for n in [*before, ranks])
    nodes = max(1, ranks // NODE)
    lazy = 2 * max(1, (ranks - 1).bit_length())  # a barrier of vLLM's world group
    return Costs(
        store_requests=(mesh + old_roll_call(nodes), calls[nodes] + 2 * ranks * lazy),
        open_files=(BASE_FILES + sum(n - 1 for n in [*before, ranks]), BASE_FILES + sum(n - 1 for n in now) + lazy),
        save_gb=(OPTIMIZER * shard / 1e9, (OPTIMIZER + WEIGHTS) * own / 1e9),
        writers=(layout.pipeline * max(layout.tensor, layout.expert * layout.expert_tensor), ranks),
        start_tb=(ranks * WEIGHTS * (shard + model) / 1e12, WEIGHTS * model / 1e12),
        resume_tb=(ranks * (OPTIMIZER + WEIGHTS) * shard / 1e12, OPTIMIZER * model / 1e12),
        heartbeats=(ranks / WRITE_EVERY, ranks / max(WRITE_EVERY, ranks / WRITES_PER_S)),
        failure_reads=(ranks * ranks * 2, ranks * 2 + ranks),
    )


def slots_of(arch: Architecture, layout: Layout) -> list[Slot]:
    """The weight table's rows on their stages, without weights."""
    ends = list(itertools.accumulate(stage_layers(layout, arch.num_layers)))
    slots = []
    for _, plans in itertools.groupby(registry.tensors(arch), key=lambda plan: (id(plan.mapping), plan.layer)):
        slot = Slot(list(plans), dtype=torch.bfloat16)
        first = slot.plans[0]
        slot.whole = isinstance(first.mapping, Replicated)
        last = "output" in first.name or "final" in first.name
        slot.stage = bisect.bisect_right(ends, first.layer) if first.layer is not None else last * (layout.pipeline - 1)
        size = layout.expert_tensor if first.expert is not None else layout.tensor
        slot.shape = first.local_shape(1 if slot.whole else size)
        slots.append(slot)
    return slots


def engine_boxes(arch: Architecture, position: int, size: int, expert: bool) -> dict[str, Box]:
    """What rank `position` of a vLLM engine of `size` ranks copies, by vLLM's rules: tests compare it with vLLM's own
    loading of small models."""
    boxes: dict[str, Box] = {}
    for plan in registry.tensors(arch):
        for name, shape in zip(plan.hf, plan.shapes, strict=True):
            cuts, dim = size, plan.mapping.dim
            at = position
            if plan.expert is not None and expert:
                assert arch.moe is not None
                if plan.expert * size // arch.moe.num_experts != position:
                    continue
                cuts, at = 1, 0
            elif isinstance(plan.mapping, Replicated) or "_a_proj" in name:
                cuts, at = 1, 0
            elif isinstance(plan.mapping, QKV) and name != plan.hf[0]:  # no smaller than a group
                cuts = min(size, plan.mapping.groups)
                at = position * cuts // size
            rows = shape[dim]
            if isinstance(plan.mapping, Vocabulary):
                rows = -(-rows // 64) * 64  # as vLLM pads it
            start, stop = at * rows // cuts, min((at + 1) * rows // cuts, shape[dim])
            boxes[name] = tuple((start, stop) if d == dim else (0, n) for d, n in enumerate(shape))
    return boxes


def refit_row(name: str, sizes: dict[str, Any], ranks: int, tensor: int, expert: bool) -> dict[str, float]:
    """Gigabytes of a refit that a rank receives: as it was (the model), now at most, and what an engine rank holds."""
    arch, layout = KNOWN_MODELS[name], Layout(world_size=ranks, **sizes)
    wanted = [engine_boxes(arch, position, tensor, expert) for position in range(tensor)]
    schedule = Schedule(slots_of(arch, layout), layout, wanted, NODE)
    whole = rank_state(arch, Layout(), 0)
    node_ranks = range(0, ranks, NODE)
    return {
        "before": WEIGHTS * (whole.dense_elements + whole.expert_elements) / 1e9,
        "now": max(schedule.received(rank) for rank in range(tensor)) / 1e9,
        "held": max(sum(WEIGHTS * math.prod(b - a for a, b in box) for box in w.values()) for w in wanted) / 1e9,
        "from_other_nodes": max(_from_others(schedule, rank) for rank in (0, node_ranks[-1])) / 1e9,
        "messages": len(schedule.buckets) * (2 if schedule.copies > 1 else 1),
    }


def _from_others(schedule: Schedule, rank: int) -> int:
    """Bytes that `rank` fetches from ranks of other nodes."""
    ranges = (
        schedule.overlap(bucket, source, rank)
        for bucket in schedule.buckets
        for source in schedule.block_ranks(rank)
        if source // NODE != rank // NODE
    )
    return sum(stop - start for start, stop in ranges)


def print_refits() -> None:
    print(f"\nRefit, GB a rank{'':<46}before -> now (held)   of it from other nodes   messages")
    for name, sizes, ranks, tensor, expert in REFITS:
        row = refit_row(name, sizes, ranks, tensor, expert)
        engine = f"engine of {tensor}{', whole experts' if expert else ''}"
        label = f"{name} {' '.join(f'{k}={v}' for k, v in sizes.items())}, {ranks} ranks, {engine}"
        print(
            f"{label:<84} {row['before']:.0f} -> {row['now']:.1f} ({row['held']:.1f})   "
            f"{row['from_other_nodes']:.1f}   {row['messages']:.0f}"
        )


def old_roll_call(nodes: int) -> int:
    """Each node read every card, and every outcome at the end. Fits what was counted when it did so: to sign in 136 at
    8 nodes, 4,695 at 64, 68,894 at 256, and as many or more at the end."""
    return 2 * (nodes * nodes + 9 * nodes)


def main() -> None:
    parser = argparse.ArgumentParser(description="Costs of a run by its number of ranks, before and now")
    parser.add_argument("--ranks", default="8,64,512,4096", help="comma-separated (default: 8,64,512,4096)")
    counts = [int(part) for part in parser.parse_args().ranks.split(",")]
    request = seconds_a_request()
    calls = {max(1, n // NODE): roll_call_requests(max(1, n // NODE)) for n in counts}
    print(f"a request to the store takes {request * 1e6:.0f} us here; before -> now")
    for name, sizes in MODELS.items():
        fitting = [n for n in counts if n % Layout(**sizes).model == 0 and n >= 8 * sizes.get("pipeline", 1)]
        found = [costs(name, n, calls) for n in fitting]
        print(f"\n{name}, {sizes}")
        print(f"{'ranks':<44}" + "".join(f"{n:>24,}" for n in fitting))
        rows = [
            ("store requests at start and end, all ranks", [c.store_requests for c in found], 1.0),
            ("  seconds of them", [c.store_requests for c in found], request),
            ("open files, a rank", [c.open_files for c in found], 1.0),
            ("host memory of a save, GB a rank", [c.save_gb for c in found], 1.0),
            ("ranks that write a checkpoint", [c.writers for c in found], 1.0),
            ("model read at start, TB in all", [c.start_tb for c in found], 1.0),
            ("checkpoint read by a resume, TB in all", [c.resume_tb for c in found], 1.0),
            ("heartbeat writes a second", [c.heartbeats for c in found], 1.0),
            ("heartbeats read when all ranks fail", [c.failure_reads for c in found], 1.0),
        ]
        for label, pairs, factor in rows:
            cells = [f"{_short(old * factor)} -> {_short(new * factor)}" for old, new in pairs]
            print(f"{label:<44}" + "".join(f"{cell:>24}" for cell in cells))
    print_refits()


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    main()
