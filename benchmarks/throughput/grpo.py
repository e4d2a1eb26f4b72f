"""Throughput of GRPO: the algorithm itself on synthetic prompts, its own figures after warm-up, of every rank."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from benchmarks.throughput.phases import Profile, summary
from benchmarks.throughput.probe import matmul_tflops
from benchmarks.throughput.sft import Options, rates, stragglers
from megatron_posttrain.config.algorithms import ALGORITHMS, GrpoConfig
from megatron_posttrain.models.build import DTYPES
from megatron_posttrain.planning.flops import flops_per_token
from megatron_posttrain.platform import platform
from megatron_posttrain.training.prepare import Prepared, prepare
from megatron_posttrain.training.run import listening

PHASES = ("rollout", "train", "refit")
PROMPTS = 512


class Recorder:
    """This rank's figures of every step, as the algorithm logs them; it profiles the last `options.profiled` steps."""

    def __init__(self, options: Options) -> None:
        self.options, self.profile = options, Profile()
        self.steps: list[Mapping[str, float]] = []
        self.peak_memory_gib = 0.0
        self._recording = contextlib.ExitStack()

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        with listening(self._after), self._recording:
            yield

    def _after(self, step: int, metrics: Mapping[str, float]) -> None:
        self.steps.append(metrics)
        timed = self.options.warmup + self.options.steps
        if len(self.steps) == timed:
            self.peak_memory_gib = platform().peak_memory_bytes() / 2**30
            if self.options.profiled:
                dist.barrier()
                self._recording.enter_context(self.profile.recording())
        elif len(self.steps) == timed + self.options.profiled:
            self._recording.close()


def measure_grpo(config: GrpoConfig, options: Options) -> dict[str, Any] | None:
    """One result, the same on every rank; None when the run was asked to stop.

    Needs the model's weights here, since vLLM reads them. The model decides how long its answers are.
    Training's TFLOP/s count the update, with samples of their mean length; old log-probs come on top.
    """
    from megatron.core import parallel_state

    import megatron_posttrain.rollout  # noqa: F401 - sets vLLM's environment before it is imported

    prepared, recorder = prepare(config), Recorder(options)
    with tempfile.TemporaryDirectory() as folder, recorder.listening():  # every rank's own folder
        prompts = Path(folder) / "prompts.jsonl"
        draw = random.Random(config.training.seed)
        lines = [f"What is {draw.randrange(100)} + {draw.randrange(100)}?" for _ in range(PROMPTS)]
        prompts.write_text("".join(json.dumps({"prompt": line, "answer": "0"}) + "\n" for line in lines))
        if ALGORITHMS[config.command].load()(_shortened(config, prompts, Path(folder) / "run", options)):
            return None
    local = {
        "host": socket.gethostname(),
        "stage": parallel_state.get_pipeline_model_parallel_rank(),
        "steps": recorder.steps[options.warmup :][: options.steps],
        "matmul_tflops": matmul_tflops(DTYPES[config.precision.dtype]),
        "peak_memory_gib": recorder.peak_memory_gib,
        "profile": recorder.profile.result(options.profiled) if options.profiled else None,
    }
    ranks: list[dict[str, Any]] = [{}] * prepared.layout.world_size
    dist.all_gather_object(ranks, local)
    return _result(config, prepared, options, ranks)


def _result(
    config: GrpoConfig, prepared: Prepared, options: Options, ranks: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    # A step is done when its slowest rank is.
    seconds = [max(rank["steps"][n]["step_seconds"] for rank in ranks) for n in range(options.steps)]
    tokens = statistics.fmean(s["tokens_per_second"] * s["step_seconds"] for s in ranks[0]["steps"])
    own = [_phases(rank["steps"]) for rank in ranks]
    phases = {phase: statistics.fmean(p[phase] for p in own) for phase in own[0]}
    world = prepared.layout.world_size
    samples = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    length = max(1, round(tokens / samples))
    flops = tokens * flops_per_token(prepared.arch, length)
    probes, stages = [rank["matmul_tflops"] for rank in ranks], [rank["stage"] for rank in ranks]
    return {
        "command": "grpo",
        "layout": prepared.layout.sizes,
        "world_size": world,
        "micro_batch_size": config.training.micro_batch_size,
        "global_batch_size": config.training.global_batch_size,
        "sequence_length": config.data.sequence_length,
        "mean_length": length,
        "tokens_per_step": tokens,
        "flops_per_step": flops,
        "step_seconds": seconds,
        **rates(tokens, flops, statistics.fmean(seconds), world),
        "tflops_per_gpu": flops / phases["train"] / world / 1e12,
        "phase_seconds": phases,
        "peak_memory_gib": max(rank["peak_memory_gib"] for rank in ranks),
        "ranks": [
            {key: rank[key] for key in ("host", "matmul_tflops", "peak_memory_gib")} | {"phase_seconds": p}
            for rank, p in zip(ranks, own, strict=True)
        ],
        "stragglers": stragglers(probes, [rank["host"] for rank in ranks]),
        "profile": summary([rank["profile"] for rank in ranks], options.profiled, stages) if options.profiled else None,
    }


def _phases(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    phases = {phase: statistics.fmean(step[f"{phase}_seconds"] for step in steps) for phase in PHASES}
    return phases | {"other": statistics.fmean(step["step_seconds"] for step in steps) - sum(phases.values())}


def _shortened(config: GrpoConfig, prompts: Path, output: Path, options: Options) -> GrpoConfig:
    """The same steps on other prompts, without checkpoints."""
    return config.model_copy(
        update={
            "data": config.data.model_copy(update={"train": str(prompts)}),
            "training": config.training.model_copy(update={"steps": options.warmup + options.steps + options.profiled}),
            "checkpoint": config.checkpoint.model_copy(update={"every": None, "resume": "never"}),
            "logging": config.logging.model_copy(update={"tensorboard": False}),
            "output": str(output),
        }
    )
