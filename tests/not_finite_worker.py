"""Run by test_not_finite.py: a good step, then one that something spoils on one rank. worker.py JOBS.json:
[{"model", "layout", "dtype", "fault", "rank", "out"}]; facts.json: what was said by all ranks, whether weights moved.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_posttrain.algorithms.losses import cross_entropy_terms
from megatron_posttrain.config.algorithms import SftConfig
from megatron_posttrain.errors import NotFiniteError
from megatron_posttrain.models.sharded import unwrap
from megatron_posttrain.training.batches import rank_micro_batches
from megatron_posttrain.training.engine import Engine
from megatron_posttrain.training.heads import Output
from megatron_posttrain.training.totals import per_token
from tests.jobs import engine_of, run_jobs
from tests.layouts.worker import batch


def loss(factor: float, output: Output, micro_batch: Any) -> Any:
    return factor * cross_entropy_terms(output["logprobs"], micro_batch.loss_mask), {}


def state(engine: Engine) -> list[Tensor]:
    """This rank's weights, main weights and moments."""
    tensors = [p.detach() for module in engine.modules for p in module.parameters()]
    for part in engine.optimizer.chained_optimizers:
        for values in part.optimizer.state.values():
            tensors += [value for value in values.values() if isinstance(value, Tensor)]
        tensors += [p.detach() for group in part.optimizer.param_groups for p in group["params"]]
    return [tensor.clone() for tensor in tensors]


def spoil(engine: Engine, fault: str) -> None:
    """On this rank: the output of its second layer's MLP, or the gradient of its down-projection."""
    layer = unwrap(engine.modules[-1]).decoder.layers[1]  # type: ignore[union-attr, index]
    if fault == "activation":
        layer.mlp.linear_fc2.register_forward_hook(lambda module, inputs, out: (out[0] * torch.nan, out[1]))
    if fault == "gradient":
        layer.mlp.linear_fc2.register_full_backward_hook(lambda module, into, out: (into[0] * torch.inf,))
    if fault == "weight":
        layer.mlp.linear_fc2.weight.data[0, 0] = torch.nan


def run(job: dict[str, Any]) -> None:
    config = SftConfig.model_validate(
        {
            "model": {"path": job["model"]},
            "parallel": job["layout"],
            "precision": {"dtype": job["dtype"]},
            "data": {"train": "none"},
            "output": job["out"],
        }
    )
    engine = engine_of(config)
    rows = rank_micro_batches(batch(0, engine.arch.vocab_size), engine.groups, 1)
    engine.train_step(rows, partial(loss, 1.0), per_token, 1e-3)
    engine.gather_weights()
    here = dist.get_rank() == job["rank"]
    if here:
        spoil(engine, job["fault"])
    before = state(engine)
    message = ""
    try:
        factor = float("nan") if here and job["fault"] == "loss" else 1.0
        engine.train_step(rows, partial(loss, factor), per_token, 1e-3)
    except NotFiniteError as error:
        message = str(error)
    engine.gather_weights()
    same = all(
        torch.equal(x.view(torch.uint8), y.view(torch.uint8))
        for x, y in zip((t.reshape(-1) for t in before), (t.reshape(-1) for t in state(engine)), strict=True)
    )
    facts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(facts, (message, same))
    if dist.get_rank() == 0:
        Path(job["out"]).write_text(json.dumps(facts))


if __name__ == "__main__":
    run_jobs(run)
