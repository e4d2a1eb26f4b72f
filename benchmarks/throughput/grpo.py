"""Throughput of GRPO: the algorithm itself on synthetic prompts, its own figures after warm-up."""

from __future__ import annotations

import json
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.throughput.sft import Options
from megatron_posttrain.config.schema import GrpoConfig
from megatron_posttrain.planning.flops import flops_per_token
from megatron_posttrain.planning.layouts import sizes_of
from megatron_posttrain.platform import platform
from megatron_posttrain.training.prepare import prepare

PHASES = ("rollout", "train", "refit")
PROMPTS = 512


def measure_grpo(config: GrpoConfig, options: Options) -> dict[str, Any] | None:
    """One result, on rank 0 only (None elsewhere): the engine's end takes torch.distributed with it.

    Needs the model's weights here, since vLLM reads them. The model decides how long its answers are.
    Training's TFLOP/s count the update, with samples of their mean length; old log-probs come on top.
    """
    import megatron_posttrain.rollout  # noqa: F401 - sets vLLM's environment before it is imported
    from megatron_posttrain.algorithms.grpo import grpo

    prepared = prepare(config)
    with tempfile.TemporaryDirectory() as folder:  # of every rank its own; rank 0's gets the figures
        prompts = Path(folder) / "prompts.jsonl"
        draw = random.Random(config.training.seed)
        lines = [f"What is {draw.randrange(100)} + {draw.randrange(100)}?" for _ in range(PROMPTS)]
        prompts.write_text("".join(json.dumps({"prompt": line, "answer": "0"}) + "\n" for line in lines))
        grpo(_shortened(config, prompts, Path(folder) / "run", options))
        metrics = Path(folder) / "run" / "metrics.jsonl"
        if not metrics.exists():
            return None
        steps = [json.loads(line) for line in metrics.read_text().splitlines()][options.warmup :]
    seconds = [step["step_seconds"] for step in steps]
    tokens = [step["tokens_per_second"] * step["step_seconds"] for step in steps]
    phases = {phase: statistics.fmean(step[f"{phase}_seconds"] for step in steps) for phase in PHASES}
    mean, world = statistics.fmean(seconds), prepared.layout.world_size
    samples = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    length = max(1, round(statistics.fmean(tokens) / samples))
    flops = statistics.fmean(tokens) * flops_per_token(prepared.arch, length)
    return {
        "command": "grpo",
        "layout": sizes_of(prepared.layout),
        "world_size": world,
        "micro_batch_size": config.training.micro_batch_size,
        "global_batch_size": config.training.global_batch_size,
        "sequence_length": config.data.sequence_length,
        "mean_length": length,
        "tokens_per_step": statistics.fmean(tokens),
        "flops_per_step": flops,
        "step_seconds": seconds,
        "mean_step_seconds": mean,
        "tokens_per_second": sum(tokens) / sum(seconds),
        "tokens_per_second_per_gpu": sum(tokens) / sum(seconds) / world,
        "tflops_per_gpu": flops / phases["train"] / world / 1e12,
        "phase_seconds": phases | {"other": mean - sum(phases.values())},
        "peak_memory_gib": platform().peak_memory_bytes() / 2**30,
    }


def _shortened(config: GrpoConfig, prompts: Path, output: Path, options: Options) -> GrpoConfig:
    """The same steps on other prompts, without checkpoints."""
    return config.model_copy(
        update={
            "data": config.data.model_copy(update={"train": str(prompts)}),
            "training": config.training.model_copy(update={"steps": options.warmup + options.steps}),
            "checkpoint": config.checkpoint.model_copy(update={"every": None, "resume": "never"}),
            "logging": config.logging.model_copy(update={"tensorboard": False}),
            "output": str(output),
        }
    )
