"""What a node's ranks do together: collectives, layouts, refit, checkpoints. Under torchrun only."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.gpu_check import subjects
from benchmarks.gpu_check.harness import Check, Facts, Setting, Skip, seconds_of
from benchmarks.scale import engine_boxes
from megatron_posttrain.algorithms.losses import cross_entropy
from megatron_posttrain.config.algorithms import SftConfig
from megatron_posttrain.config.schema import CheckpointConfig
from megatron_posttrain.models.architecture import Architecture
from megatron_posttrain.models.layout_checks import problems
from megatron_posttrain.parallel.groups import Groups, broadcast_object, make_groups, start_distributed
from megatron_posttrain.parallel.layout import Layout
from megatron_posttrain.platform import platform
from megatron_posttrain.training.batches import rank_micro_batches
from megatron_posttrain.training.checkpoints import Checkpoints
from megatron_posttrain.training.engine import Engine
from megatron_posttrain.training.totals import per_token

LOSS_TOLERANCE = 0.02  # relative, bf16
LAYOUTS = (
    {"tensor": 2},
    {"pipeline": 2},
    {"context": 2},
    {"expert": 2},
    {"tensor": 2, "pipeline": 2, "expert": 2},
    {"tensor": 2, "context": 2, "expert": 4},
    {"expert": 8},
)


@contextmanager
def groups(**sizes: Any) -> Iterator[Groups]:
    """Of a layout of all ranks. Raises Skip where they are too few."""
    from megatron.core import parallel_state

    start_distributed()
    layout = Layout(world_size=dist.get_world_size(), **sizes)
    if problem := next(problems(layout, small(True)), None):
        raise Skip(problem)
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    try:
        yield make_groups(layout, 0)
    finally:
        parallel_state.destroy_model_parallel()
        subjects.groups.cache_clear()


def small(toy: bool) -> Architecture:
    return subjects.shrunk("Qwen3-30B-A3B", 64 if toy else 2048, layers=4)


def collective(name: str) -> Check:
    """Right, and how fast: gigabytes a second of a rank's link, by NCCL's rule for the collective."""

    def check(setting: Setting) -> Facts:
        start_distributed()
        rank, world, device = dist.get_rank(), dist.get_world_size(), platform().device
        each = (1 << 14 if setting.toy else 1 << 27) // world
        mine = torch.full((world * each,), float(rank + 1), dtype=torch.bfloat16, device=device)
        out, part = torch.empty_like(mine), mine[:each].clone()
        total = float(world * (world + 1) / 2)
        ordered = torch.arange(1, world + 1, device=device).repeat_interleave(each).to(torch.bfloat16)
        work: dict[str, tuple[Callable[[], object], torch.Tensor, torch.Tensor, int]] = {
            "all_reduce": (lambda: dist.all_reduce(out.copy_(mine)), out, torch.full_like(out, total), 2),
            "all_gather": (lambda: dist.all_gather_into_tensor(out, part), out, ordered, 1),
            "reduce_scatter": (lambda: dist.reduce_scatter_tensor(part, mine), part, torch.full_like(part, total), 1),
            "all_to_all": (lambda: dist.all_to_all_single(out, mine), out, ordered, 1),
        }
        run, found, wanted, passes = work[name]
        run()
        assert torch.equal(found, wanted), f"{name} gives {found[0].item()}, not {wanted[0].item()}"
        seconds = seconds_of(run, setting.toy)
        return {"gb_per_second": passes * (world - 1) / world * out.nbytes / seconds / 1e9, "ranks": world}

    return check


def train(engine: Engine, of: SftConfig, steps: range) -> list[float]:
    """Losses of the same batches under any layout."""
    found = []
    for step in steps:
        rows = [[s] for s in subjects.sequences(2 * dist.get_world_size(), 64, engine.arch.vocab_size, step)]
        batches = rank_micro_batches(rows, engine.groups, 1)
        found.append(engine.train_step(batches, cross_entropy, per_token, of.optimizer.lr).loss)
    return found


def layout_check(sizes: dict[str, int]) -> Check:
    """Training steps under a layout lose what they lose under data parallelism, from the same weights."""

    def check(setting: Setting) -> Facts:
        arch, of = small(setting.toy), subjects.config("auto")
        found: list[list[float]] = []
        with tempfile.TemporaryDirectory() as directory:
            shared = Path(broadcast_object(directory))
            for each in ({}, sizes):
                with groups(**each) as made:
                    engine = Engine.of(of, arch, made)
                    checkpoints = Checkpoints(shared, CheckpointConfig(every=1))
                    if each:
                        checkpoints.resume(engine)
                    else:
                        train(engine, of, range(1))  # an optimizer has no states before its first step
                        checkpoints.save(engine, 1)
                    found.append(train(engine, of, range(1, 4)))
            dist.barrier()
        worst = max(abs(a / b - 1) for a, b in zip(*found, strict=True))
        assert worst < LOSS_TOLERANCE, f"losses {found[1]}, of data parallelism {found[0]}"
        return {"loss": found[1][-1], "largest_difference": worst}

    return check


def refit_check(setting: Setting) -> Facts:
    """The trainer's shares as ranks of one engine get them; digests of all that came."""
    start_distributed()
    world = dist.get_world_size()
    arch = small(setting.toy)
    sizes = {"tensor": 2, "pipeline": 2, "expert": 2} if world % 4 == 0 else {"tensor": world}
    with groups(**sizes) as made:
        engine = Engine.of(subjects.config("auto"), arch, made, train=False)
        wanted = [engine_boxes(arch, position, world, expert=True) for position in range(world)]
        shares = engine.exporter.shares(wanted)

        def work() -> None:
            for _ in shares.noted(shares.hf_tensors()):
                pass

        seconds = seconds_of(work, setting.toy)
        problem = shares.problem()
        assert problem is None, problem
        return {"gb": shares.received / 1e9, "gb_per_second": shares.received / seconds / 1e9, "seconds": seconds}


def checkpoint_check(setting: Setting) -> Facts:
    """All ranks write and read one checkpoint; the steps after it are those of the run that went on."""
    arch, of = small(setting.toy), subjects.config("auto")
    with tempfile.TemporaryDirectory() as directory, groups() as made:
        shared = Path(broadcast_object(directory))
        engine = Engine.of(of, arch, made)
        train(engine, of, range(1))
        checkpoints = Checkpoints(shared, CheckpointConfig(every=1))
        start = time.perf_counter()
        checkpoints.save(engine, 1)
        saved = time.perf_counter() - start
        size = sum(file.stat().st_size for file in shared.rglob("*") if file.is_file())
        went_on = train(engine, of, range(1, 3))
        other = Engine.of(of, arch, made)
        start = time.perf_counter()
        checkpoints.resume(other)
        loaded = time.perf_counter() - start
        resumed = train(other, of, range(1, 3))
        dist.barrier()
    assert resumed == went_on, f"losses {resumed} after resuming, {went_on} without"
    return {"gb": size / 1e9, "write_gb_per_second": size / saved / 1e9, "read_gb_per_second": size / loaded / 1e9}


def _name(sizes: dict[str, int]) -> str:
    return " ".join(f"{key}={size}" for key, size in sizes.items())


RANKS: list[tuple[str, Check]] = [
    *((f"ranks: {name}", collective(name)) for name in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")),
    *((f"ranks: layout {_name(sizes)}", layout_check(sizes)) for sizes in LAYOUTS),
    ("ranks: refit", refit_check),
    ("ranks: checkpoint", checkpoint_check),
]
