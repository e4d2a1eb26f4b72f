"""Run under torchrun by test_layouts.py: scores and trains one model under several layouts in one job.

worker.py JOBS.json: [{"model", "layout": {...}, "steps", "options": {...}, "out"}]
`grouped`: experts by grouped products, as on CUDA; `fused`: megatron-core's fused activations, as there;
`bucket`: elements of one message of overlapped communication; `row_multiple`: tokens of a micro-batch, as for FP8;
`rows`: of a step, 4 if not said; `precision`: of the configuration, fp32 if not said; `score`: false to train only;
`trained`: export the trained weights too; `offload`: free what only a step needs, after every step.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from megatron_posttrain.algorithms.losses import cross_entropy
from megatron_posttrain.checkpoint.hf import check_directory
from megatron_posttrain.config.algorithms import SftConfig
from megatron_posttrain.data.batch import Sequence
from megatron_posttrain.models import build
from megatron_posttrain.models.layout_checks import check_layout
from megatron_posttrain.models.modules import kernels
from megatron_posttrain.parallel.groups import make_groups
from megatron_posttrain.parallel.layout import Layout
from megatron_posttrain.training import optimizer
from megatron_posttrain.training.batches import rank_micro_batches
from megatron_posttrain.training.engine import Engine
from megatron_posttrain.training.export import export
from megatron_posttrain.training.sequences import sequence_logprobs
from megatron_posttrain.training.totals import per_token
from tests.helpers.jobs import run_jobs

SCORED = [5, 17, 33, 8, 50, 9, 12, 21]
ROWS = [[11, 20], [31], [7, 9, 15], [24, 6], [16, 16], [30], [13, 12, 5], [28]]


def sequences(lengths: list[int], seed: int, vocabulary: int) -> list[Sequence]:
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randint(0, vocabulary, (n,), generator=generator).tolist() for n in lengths]
    return [Sequence(ids, [0, 0] + [1] * (len(ids) - 2), index=i) for i, ids in enumerate(drawn)]


def batch(step: int, vocabulary: int, rows: int = 4) -> list[list[Sequence]]:
    return [sequences(row, 1000 * step + i, vocabulary) for i, row in enumerate(ROWS[:rows])]


def run(job: dict[str, Any]) -> None:
    config = SftConfig.model_validate(
        {
            "model": {"path": job["model"], **job.get("model_options", {})},
            "parallel": job["layout"],
            "precision": job.get("precision", {"dtype": "fp32"}),
            "data": {"train": "none"},
            "optimizer": {"lr": 1e-3, "weight_decay": 0.1, "clip_grad": 1.0},
            "output": job["out"],
        }
    )
    arch = check_directory(config.model.path)[1]
    layout = Layout.from_config(config.parallel, dist.get_world_size())
    check_layout(layout, arch)
    groups = make_groups(layout, 0)
    engine = Engine.of(config, arch, groups)
    packed, alone = [], []
    if job.get("score", True):
        scored = [replace(s, loss_mask=[1] * len(s.token_ids)) for s in sequences(SCORED, 7, arch.vocab_size)]
        packed = sequence_logprobs(engine, scored, 64)
        alone = sequence_logprobs(engine, scored, max(SCORED))
    if job.get("export"):
        export(engine, Path(job["model"]), Path(job["out"]) / "hf")
    losses, norms = [], []
    for step in range(job["steps"]):
        rows = batch(step, arch.vocab_size, job.get("rows", 4))
        result = engine.train_step(rank_micro_batches(rows, groups, 1), cross_entropy, per_token, config.optimizer.lr)
        if job.get("offload"):
            engine.offload()
            assert all(buffer.grad_data.untyped_storage().size() == 0 for c in engine.chunks for buffer in c.buffers)
        losses.append(result.loss)
        norms.append(result.grad_norm)
    if job.get("trained"):
        export(engine, Path(job["model"]), Path(job["out"]) / "trained")
    if dist.get_rank() == 0:
        out = Path(job["out"])
        out.mkdir(parents=True, exist_ok=True)
        facts = {"losses": losses, "grad_norms": norms}
        facts |= {"packed": [x.tolist() for x in packed], "alone": [x.tolist() for x in alone]}
        (out / "facts.json").write_text(json.dumps(facts))


def patched(job: dict[str, Any]) -> None:
    with (
        patch.object(kernels, "grouped_matmul", lambda dtype: job.get("grouped", False)),
        patch.object(kernels, "compiled_pointwise", lambda: job.get("fused", False)),
        patch.object(Engine, "row_multiple", job["row_multiple"]) if "row_multiple" in job else nullcontext(),
        patch.object(optimizer, "BUCKET_ELEMENTS", job.get("bucket", optimizer.BUCKET_ELEMENTS)),
    ):
        run(job)


def unmended(job: dict[str, Any]) -> None:
    """Without the workaround named in `without`; how it failed is a fact, too."""
    with patch.object(build, job["without"], lambda chunk: None):
        try:
            patched(job)
        except Exception as error:
            if dist.get_rank() == 0:
                Path(job["out"]).mkdir(parents=True, exist_ok=True)
                (Path(job["out"]) / "facts.json").write_text(json.dumps({"failed": str(error)}))


if __name__ == "__main__":
    run_jobs(lambda job: (unmended if "without" in job else patched)(job))
