"""Run as ranks by test_heads.py: heads of one model under several layouts in one job.

heads_worker.py JOB.json: {"model", "layouts": [{...}], "out"}
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_posttrain.algorithms.losses import cross_entropy
from megatron_posttrain.checkpoint.hf import check_directory
from megatron_posttrain.config.algorithms import SftConfig
from megatron_posttrain.data.batch import PackedBatch, Sequence
from megatron_posttrain.parallel.groups import make_groups, start_distributed
from megatron_posttrain.parallel.layout import Layout
from megatron_posttrain.training.batches import rank_token_batches
from megatron_posttrain.training.engine import Engine
from megatron_posttrain.training.heads import LabelLogprobs, Output, Scalars, TopK
from megatron_posttrain.training.totals import Mean, per_sequence, per_token

LENGTHS = [5, 17, 33, 8, 12, 21]
K = 7
Z_LOSS = 0.1


def sequences(vocabulary: int) -> list[Sequence]:
    generator = torch.Generator().manual_seed(3)
    drawn = [torch.randint(0, vocabulary, (n,), generator=generator).tolist() for n in LENGTHS]
    return [Sequence(ids, [1] * len(ids), index=i) for i, ids in enumerate(drawn)]


def squares(output: Output, batch: PackedBatch) -> tuple[Tensor, dict[str, Mean]]:
    """(value of the last token - 1)^2 of every sequence."""
    ends = batch.cu_seqlens[:-1].long() + torch.tensor(batch.real_lengths) - 1
    real = torch.tensor(batch.sequence_ids) >= 0
    terms = ((output["values"][ends] - 1) ** 2)[real]
    return terms, {"value": Mean(output["values"][ends][real].detach().sum(), len(terms))}


def run(job: dict[str, Any], layout: dict[str, int]) -> dict[str, Any]:
    from megatron.core import parallel_state

    config = SftConfig.model_validate(
        {
            "model": {"path": job["model"], "moe": {"load_balancing": "none"}},
            "parallel": layout,
            "precision": {"dtype": "fp32"},
            "data": {"train": "-"},
            "output": "-",
        }
    )
    arch = check_directory(job["model"])[1]
    groups = make_groups(Layout.from_config(config.parallel, dist.get_world_size()), 0)
    facts: dict[str, Any] = {}
    batches = rank_token_batches(sequences(arch.vocab_size), groups, arch, 48)
    engine = Engine.of(config, arch, groups, train=False)
    facts["requires_grad"] = sum(p.requires_grad for module in engine.modules for p in module.parameters())
    top = {}
    for batch, output in zip(batches, engine.forward(batches, TopK(K)), strict=True):
        cut = zip(batch.sequence_ids, *(batch.per_sequence(output[n]) for n in ("logprobs", "tokens")), strict=True)
        top |= {index: [logprobs.tolist(), tokens.tolist()] for index, logprobs, tokens in cut if index >= 0}
    trained = Engine.of(config, arch.with_scalar_head(), groups)
    values = {}
    for batch, output in zip(batches, trained.forward(batches, Scalars(last=True)), strict=True):
        ends = batch.cu_seqlens[:-1].long() + torch.tensor(batch.real_lengths) - 1
        pairs = zip(batch.sequence_ids, output["values"][ends].tolist(), strict=True)
        values |= {index: value for index, value in pairs if index >= 0}
    result = trained.train_step(batches, squares, per_sequence, 1e-3, Scalars(last=True))
    facts |= {"loss": result.loss, "grad_norm": result.grad_norm, "value": result.metrics["value"].value}
    precision = config.precision.model_copy(update={"head": "fp32"})  # as exact as without, under every layout
    language = Engine.of(config.model_copy(update={"precision": precision}), arch, groups)
    z_loss = language.train_step(
        batches, partial(cross_entropy, z_loss=Z_LOSS), per_token, 1e-3, LabelLogprobs(normalisers=True)
    )
    facts["z_loss"] = [z_loss.loss, z_loss.grad_norm, z_loss.metrics["z_loss"].value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (top, values))
    facts["top"] = [found for _, found in sorted({k: v for part, _ in gathered for k, v in part.items()}.items())]
    facts["values"] = [found for _, found in sorted({k: v for _, part in gathered for k, v in part.items()}.items())]
    parallel_state.destroy_model_parallel()
    return facts


def main() -> None:
    torch.set_num_threads(1)
    start_distributed()
    job = json.loads(Path(sys.argv[1]).read_text())
    facts = [run(job, layout) for layout in job["layouts"]]
    if dist.get_rank() == 0:
        Path(job["out"]).write_text(json.dumps(facts))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
