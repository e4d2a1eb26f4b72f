"""Throughput of a config's training step on synthetic rows: after warm-up, by phase, against the device's peak."""

from __future__ import annotations

import contextlib
import gc
import platform as host
import socket
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.throughput.phases import Profile, summary
from benchmarks.throughput.probe import matmul_tflops
from megatron_posttrain.algorithms.losses import cross_entropy
from megatron_posttrain.config.schema import Config
from megatron_posttrain.data.batch import Sequence as TokenSequence
from megatron_posttrain.models.architecture import Architecture
from megatron_posttrain.models.build import DTYPES
from megatron_posttrain.parallel.groups import make_groups
from megatron_posttrain.parallel.layout import Layout
from megatron_posttrain.planning.flops import training_flops
from megatron_posttrain.planning.gpus import GPUS
from megatron_posttrain.platform import platform
from megatron_posttrain.platform.describe import describe_device
from megatron_posttrain.training.batches import rank_micro_batches
from megatron_posttrain.training.engine import Engine
from megatron_posttrain.training.timing import PhaseTimer
from megatron_posttrain.training.totals import per_token

PHASES = ("data", "forward_backward", "optimizer", "other")
PACKAGES = ("torch", "megatron-core", "transformers", "megatron-posttrain")


@dataclass(frozen=True)
class Options:
    """What is measured. Steps, timed and then profiled; `mean_length` in tokens, None: one sequence fills a row."""

    steps: int = 10
    warmup: int = 3
    profiled: int = 2
    mean_length: int | None = None


def row_lengths(config: Config, mean_length: int | None) -> list[list[int]]:
    """Lengths of the packed sequences of every row of the global batch, the same on every rank and step.

    Rows are full. With a mean length, sequences are drawn evenly from half of it to half as much again.
    """
    size = config.data.sequence_length
    if mean_length is None or mean_length >= size:
        return [[size]] * config.training.global_batch_size
    generator = torch.Generator().manual_seed(config.training.seed)
    rows = []
    for _ in range(config.training.global_batch_size):
        row, room = [], size
        while room > 0:
            drawn = int(torch.randint(max(2, mean_length // 2), mean_length * 3 // 2 + 1, (), generator=generator))
            row.append(drawn if room - drawn >= 2 else room)  # no sequence of a single token
            room -= row[-1]
        rows.append(row)
    return rows


def measure(config: Config, arch: Architecture, layout: Layout, options: Options) -> dict[str, Any]:
    """One result, the same on every rank. Collective; process groups are gone afterwards, for the next layout.

    Weights are random: speed does not depend on them, but a trained router balances its experts less evenly.
    """
    from megatron.core import parallel_state

    platform().reset_peak_memory()
    groups = make_groups(layout, config.training.seed)
    config = config.model_copy(update={"model": config.model.model_copy(update={"random_init": True})})
    engine = Engine.of(config, arch, groups)
    lengths = row_lengths(config, options.mean_length)
    mine = [_step(engine, config, lengths, number) for number in range(options.warmup + options.steps)]
    dist.barrier()
    local = {
        "host": socket.gethostname(),
        "stage": groups.pipeline.rank(),
        "steps": mine[options.warmup :],
        "matmul_tflops": matmul_tflops(DTYPES[config.precision.dtype]),
        "peak_memory_gib": platform().peak_memory_bytes() / 2**30,
    }
    profile = Profile()
    for number in range(options.profiled):
        _step(engine, config, lengths, number, profile.recording())
    local["profile"] = profile.result(options.profiled) if options.profiled else None
    ranks: list[dict[str, Any]] = [{}] * layout.world_size
    dist.all_gather_object(ranks, local)
    del engine
    gc.collect()
    parallel_state.destroy_model_parallel()
    return _result(config, arch, layout, options, lengths, ranks)


def _step(
    engine: Engine,
    config: Config,
    lengths: Sequence[Sequence[int]],
    number: int,
    scope: contextlib.AbstractContextManager[None] | None = None,
) -> dict[str, float]:
    """Seconds of one step on this rank, in total and by phase. All ranks start together, then enter `scope`."""
    training, groups = config.training, engine.groups
    generator = torch.Generator().manual_seed(training.seed + number)
    dist.barrier()
    platform().synchronize()
    with scope or contextlib.nullcontext():
        timer = PhaseTimer()
        with timer("data"):
            vocab = engine.arch.vocab_size
            tokens: Any = [[torch.randint(vocab, (n,), generator=generator) for n in row] for row in lengths]
            rows = [[TokenSequence(t, [1] * len(t)) for t in row] for row in tokens]
            micro_batches = rank_micro_batches(rows, groups, training.micro_batch_size)
        result = engine.train_step(micro_batches, cross_entropy, per_token, config.optimizer.lr)
        platform().synchronize()
    seconds = {"seconds": timer.total()} | timer.seconds | result.seconds
    return seconds | {"other": seconds["seconds"] - sum(seconds[p] for p in PHASES[:-1])}


def _result(
    config: Config,
    arch: Architecture,
    layout: Layout,
    options: Options,
    lengths: Sequence[Sequence[int]],
    ranks: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    # A step is done when its slowest rank is.
    seconds = [max(rank["steps"][n]["seconds"] for rank in ranks) for n in range(options.steps)]
    flat = [n for row in lengths for n in row]
    flops = training_flops(arch, flat, lora_rank=config.lora.rank if config.lora else None)
    probes = [rank["matmul_tflops"] for rank in ranks]
    profiles = [rank["profile"] for rank in ranks]
    return {
        "command": "sft",
        "layout": layout.sizes,
        "world_size": layout.world_size,
        "micro_batch_size": config.training.micro_batch_size,
        "global_batch_size": config.training.global_batch_size,
        "sequence_length": config.data.sequence_length,
        "mean_length": options.mean_length,
        "tokens_per_step": sum(flat),
        "flops_per_step": flops,
        "step_seconds": seconds,
        **rates(sum(flat), flops, statistics.fmean(seconds), layout.world_size),
        **utilisation(flops, statistics.fmean(seconds), layout.world_size, config, probes),
        "phase_seconds": {p: statistics.fmean(s[p] for rank in ranks for s in rank["steps"]) for p in PHASES},
        "peak_memory_gib": max(rank["peak_memory_gib"] for rank in ranks),
        "ranks": [_rank(rank) for rank in ranks],
        "stragglers": stragglers(probes, [rank["host"] for rank in ranks]),
        "profile": summary(profiles, options.profiled, [rank["stage"] for rank in ranks]) if options.profiled else None,
    }


def rates(tokens: float, flops: float, seconds: float, world_size: int) -> dict[str, float]:
    """Of a mean step."""
    return {
        "mean_step_seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "tokens_per_second_per_gpu": tokens / seconds / world_size,
        "tflops_per_gpu": flops / seconds / world_size / 1e12,
    }


def utilisation(
    flops: float, seconds: float, world_size: int, config: Config, probes: Sequence[float]
) -> dict[str, Any]:
    """MFU against the data sheet's peak of a known GPU, else against matrix multiplications measured on all ranks."""
    name = str(describe_device()["name"])
    gpu = next((g for key, g in sorted(GPUS.items(), reverse=True) if key in name.upper().split()), None)
    if gpu is not None:
        fp8 = config.precision.fp8 is not None and gpu.fp8_tflops is not None
        peak = float(gpu.fp8_tflops or 0.0) if fp8 else gpu.bf16_tflops
        source = f"data sheet, {gpu.name} {'fp8' if fp8 else 'bf16'}"
    else:
        peak, source = statistics.median(probes), f"measured {config.precision.dtype} matrix multiplication, {name}"
    return {"peak_tflops": peak, "peak_source": source, "mfu": flops / seconds / world_size / 1e12 / peak}


def _rank(rank: dict[str, Any]) -> dict[str, Any]:
    phases = {phase: statistics.fmean(step[phase] for step in rank["steps"]) for phase in PHASES}
    return {key: rank[key] for key in ("host", "matmul_tflops", "peak_memory_gib")} | {"phase_seconds": phases}


def stragglers(probes: Sequence[float], hosts: Sequence[str]) -> dict[str, Any]:
    """How far the slowest rank is behind, by a matrix multiplication that waits for nobody.

    A synchronous step takes every rank the same time, so its phases do not tell who is waited for. The profile's
    spread does, for the computation itself.
    """
    slowest = min(range(len(probes)), key=lambda rank: probes[rank])
    middle = statistics.median(probes)
    return {"slowest_rank": slowest, "host": hosts[slowest], "behind_median": 1 - probes[slowest] / middle}


def machine(hosts: Sequence[str] = ()) -> dict[str, Any]:
    """Of a result file: where it was measured, and with what."""
    versions: dict[str, str | None] = {"python": host.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # a checkout that is run without being installed
            versions[name] = None
    return {"hosts": sorted(set(hosts) or {socket.gethostname()}), "device": describe_device(), "versions": versions}
