"""Refit: a rank receives what its engine's rank copies, from whatever layout, and what differs from the trainer's
weights is caught by digests."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.scale import engine_boxes, slots_of
from megatron_posttrain.models.shares import Schedule
from megatron_posttrain.parallel.layout import Layout
from megatron_posttrain.planning.known_models import KNOWN_MODELS
from tests.helpers.launch import ranks
from tests.helpers.rollout_models import KINDS, make_model

# With two ranks of a node: an engine on both, whole experts apart; and engines of one rank, which fetch a half each.
QUICK = [
    {"kind": "moe_untied", "layout": {"pipeline": 2}, "tensor": 2, "expert": True, "corrupt": 4},
    {"kind": "moe_tied", "layout": {"tensor": 2, "expert": 2}, "tensor": 1, "expert": False, "corrupt": 0},
]
SPLIT = {"tensor": 2, "pipeline": 2}
SLOW = [
    {"kind": kind, "layout": SPLIT | ({"expert": 2} if moe else {}), "tensor": tensor, "expert": expert, "corrupt": 0}
    for kind, (moe, _) in KINDS.items()
    for tensor, expert in ((1, False), (2, False), (2, True))
    if moe or not expert
]


def run(directory: Path, cases: list[dict[str, Any]], processes: int, refits: int) -> list[list[dict[str, Any]]]:
    """Findings by rank and case."""
    for kind in {case["kind"] for case in cases}:
        make_model(directory / kind, kind, seed=0)
    line = ["-m", "tests.helpers.refit_worker", str(directory), json.dumps(cases), str(refits)]
    ranks(processes, *line, timeout=3600, rollout=True)
    return [json.loads((directory / f"refit.{rank}.json").read_text()) for rank in range(processes)]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    return run(tmp_path_factory.mktemp("refit"), QUICK, 2, 3)


def check(found: dict[str, Any]) -> None:
    assert found["difference"] < 1e-4
    assert found["as planned"]  # what vLLM copies is what benchmarks/scale.py counts
    assert found["held"] <= found["received"] <= 1.2 * found["held"]


def test_engines_hold_the_export_after_every_refit(quick: list[list[dict[str, Any]]]) -> None:
    for of_rank in quick:
        for found in of_rank:
            check(found)
    assert quick[0][0]["received"] < 0.7 * quick[0][0]["whole"]
    assert quick[0][0]["empty"]


def test_corrupted_refits_are_caught(quick: list[list[dict[str, Any]]]) -> None:
    """One tensor skipped, scaled by 1.001, of the step before, or that of another layer: on every rank, also where
    another one's engine holds it."""
    for rank in range(2):
        said = quick[rank][0]["said"]
        assert len(said) == 20
        assert [what for what, outcome in said.items() if not outcome.startswith("RefitError: refit 100: ")] == []
        assert quick[rank][0]["restored"] == "no error"
    assert "'model.layers.0.self_attn.q_proj.weight' is not what the trainer holds" in said["scaled q_proj"]


@pytest.mark.slow
def test_fifty_refits_of_every_kind(tmp_path: Path) -> None:
    for of_rank in run(tmp_path, SLOW, 4, 50):
        for found in of_rank:
            check(found)


LAYOUTS = [
    ({"tensor": 4, "pipeline": 2, "expert": 8}, 32, 8, True),
    ({"tensor": 4, "pipeline": 2, "expert": 8}, 32, 2, False),
    ({"pipeline": 4, "expert": 8}, 64, 16, True),
    ({"tensor": 2, "context": 2, "expert": 2, "expert_tensor": 2}, 16, 1, False),
]


@pytest.mark.parametrize(("sizes", "world", "engine", "expert"), LAYOUTS)
def test_every_byte_of_a_stream_comes_once(sizes: dict[str, int], world: int, engine: int, expert: bool) -> None:
    """To a node's ranks together, and as many bytes to a rank as its engine's rank holds."""
    arch = replace(KNOWN_MODELS["Qwen3-30B-A3B"], num_layers=4, vocab_size=8192)
    layout = Layout(world_size=world, **sizes)
    wanted = [engine_boxes(arch, position, engine, expert) for position in range(engine)]
    schedule = Schedule(slots_of(arch, layout), layout, wanted, 8)
    for rank, bucket in itertools.product((0, world // 2 - 1, world - 1), schedule.buckets):
        assert rank in schedule.node_ranks(rank)
        covered: list[tuple[int, int]] = []
        for other in schedule.node_ranks(rank):
            parts = [schedule.overlap(bucket, source, other) for source in schedule.block_ranks(other)]
            covered += [part for part in parts if part[0] < part[1]]
        ends = [0, *(stop for _, stop in covered)]
        assert [start for start, _ in covered] == ends[:-1]
        assert ends[-1] == bucket.length(rank % engine)
    held = most(wanted)
    assert held <= max(schedule.received(rank) for rank in range(engine)) < 1.02 * held


@pytest.mark.parametrize(
    ("sizes", "world", "engine", "apart"),
    [({"tensor": 4, "pipeline": 2, "expert": 8}, 32, 8, 24), ({"expert": 2}, 8, 2, 6), ({"tensor": 2}, 2, 1, 5)],
)
def test_every_byte_comes_once_to_ranks_apart(sizes: dict[str, int], world: int, engine: int, apart: int) -> None:
    """And none to a trainer; the work is shared by the ranks that hold the same."""
    arch = replace(KNOWN_MODELS["Qwen3-30B-A3B"], num_layers=4, vocab_size=8192)
    layout = Layout(world_size=world, **sizes)
    wanted = [engine_boxes(arch, position, engine, engine > 1) for position in range(engine)]
    schedule = Schedule(slots_of(arch, layout), layout, wanted, 8, apart=apart)
    everyone, sent = range(world + apart), [0] * world
    for rank, bucket in itertools.product(everyone, schedule.buckets):
        parts = {source: schedule.overlap(bucket, source, rank) for source in everyone}
        covered = sorted((start, stop, source) for source, (start, stop) in parts.items() if start < stop)
        # Ranks ask about their block alone; trainers that hold the same in other blocks serve others
        covered = [part for part in covered if part[2] in schedule.block_ranks(rank)]
        assert all(rank in schedule.block_ranks(source) for *_, source in covered)
        ends = [0, *(stop for _, stop, _ in covered)]
        assert [start for start, *_ in covered] == ends[:-1]
        assert ends[-1] == (bucket.length((rank - world) % engine) if rank >= world else 0)
        for start, stop, source in covered:
            sent[source] += stop - start
    assert most(wanted) <= max(schedule.received(world + rank) for rank in range(engine)) < 1.02 * most(wanted)
    if apart >= world:
        assert min(sent) > 0


def most(wanted: list[Any]) -> int:
    """Bytes, in bf16, of the engine's rank that wants most."""
    return max(sum(2 * math.prod(b - a for a, b in box) for box in boxes.values()) for boxes in wanted)
