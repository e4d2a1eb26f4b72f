"""Run under torchrun by test_lora.py: trains adapters of one model under several layouts in one job.

worker.py JOBS.json: [{"model", "layout": {...}, "steps", "lora": {...}, "model_options": {...}, "out"}]
`grouped`: experts by grouped products, as on CUDA.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from megatron_posttrain.algorithms.losses import cross_entropy
from megatron_posttrain.checkpoint.hf import check_directory
from megatron_posttrain.config.algorithms import SftConfig
from megatron_posttrain.models.layout_checks import check_layout
from megatron_posttrain.models.modules import kernels
from megatron_posttrain.parallel.groups import make_groups
from megatron_posttrain.parallel.layout import Layout
from megatron_posttrain.training.batches import rank_micro_batches
from megatron_posttrain.training.engine import Engine
from megatron_posttrain.training.export import export, export_adapter
from megatron_posttrain.training.sequences import sequence_logprobs
from megatron_posttrain.training.totals import per_token
from tests.helpers.jobs import run_jobs
from tests.helpers.layouts.worker import SCORED, batch, sequences

LR = 1e-2
ROWS = 2  # of a step
EPSILON = 1e-3  # so large that steps follow gradients that are nearly zero, and do not magnify their noise


def config_of(job: dict[str, Any]) -> SftConfig:
    return SftConfig.model_validate(
        {
            "model": {"path": job["model"], "moe": {"load_balancing": "none"}, **job.get("model_options", {})},
            "parallel": job["layout"],
            "precision": {"dtype": "fp32"},
            "data": {"train": "none"},
            "optimizer": {"lr": LR, "weight_decay": 0.1, "clip_grad": 1.0, "epsilon": EPSILON},
            "lora": job["lora"],
            "output": job["out"],
        }
    )


def run(job: dict[str, Any]) -> None:
    config = config_of(job)
    arch = check_directory(config.model.path)[1]
    layout = Layout.from_config(config.parallel, dist.get_world_size())
    check_layout(layout, arch)
    groups = make_groups(layout, 0)
    engine = Engine.of(config, arch, groups)
    base = [p for m in engine.modules for p in m.parameters() if not p.requires_grad]
    before = [p.clone() for p in base]
    held = sum(buffer.numel for chunk in engine.chunks for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers])
    scored = sequences(SCORED, 7, arch.vocab_size)
    start = [x.tolist() for x in sequence_logprobs(engine, scored, 64)]
    losses, norms = [], []
    for step in range(job["steps"]):
        engine.begin_step(step)
        micro_batches = rank_micro_batches(batch(step, arch.vocab_size, ROWS), groups, 1)
        result = engine.train_step(micro_batches, cross_entropy, per_token, LR)
        losses.append(result.loss)
        norms.append(result.grad_norm)
    facts: dict[str, Any] = {"losses": losses, "grad_norms": norms, "start": start, "gradient_elements": held}
    facts["trained_elements"] = sum(p.numel() for m in engine.modules for p in m.parameters() if p.requires_grad)
    facts["trained"] = [x.tolist() for x in sequence_logprobs(engine, scored, 64)]
    with engine.weights("base"):
        facts["base"] = [x.tolist() for x in sequence_logprobs(engine, scored, 64)]
    facts["base_unchanged"] = all(torch.equal(p, q) for p, q in zip(base, before, strict=True))
    out = Path(job["out"])
    export(engine, Path(job["model"]), out / "hf")
    export_adapter(engine, Path(job["model"]), out / "adapter")
    if dist.get_rank() == 0:
        (out / "facts.json").write_text(json.dumps(facts))


def alone_or_grouped(job: dict[str, Any]) -> None:
    with patch.object(kernels, "grouped_matmul", lambda dtype: job.get("grouped", False)):
        run(job)


if __name__ == "__main__":
    run_jobs(alone_or_grouped)
