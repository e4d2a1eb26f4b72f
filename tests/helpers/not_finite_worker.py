"""Run by test_not_finite.py: a good step, then steps that something spoils on one rank. worker.py JOBS.json:
[{"model", "layout", "dtype", "faults", "rank", "out"}]; OUT-FAULT.json: what all ranks said, whether weights moved.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_posttrain.algorithms.losses import cross_entropy_terms
from megatron_posttrain.config.algorithms import SftConfig
from megatron_posttrain.data.batch import PackedBatch
from megatron_posttrain.errors import NotFiniteError
from megatron_posttrain.models.sharded import unwrap
from megatron_posttrain.training.batches import rank_micro_batches
from megatron_posttrain.training.engine import Engine
from megatron_posttrain.training.heads import Output
from megatron_posttrain.training.totals import per_token
from tests.helpers.jobs import engine_of, run_jobs
from tests.helpers.layouts.worker import batch


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


@contextmanager
def spoilt(engine: Engine, fault: str) -> Iterator[None]:
    """On this rank: the output of its last stage's second MLP, or the gradient or a weight of its down-projection."""
    down = unwrap(engine.modules[-1]).decoder.layers[1].mlp.linear_fc2  # type: ignore[union-attr, index]
    kept, hook = down.weight.data[0, 0].clone(), None
    if fault == "activation":
        hook = down.register_forward_hook(lambda module, inputs, out: (out[0] * torch.nan, out[1]))
    if fault == "gradient":
        hook = down.register_full_backward_hook(lambda module, into, out: (into[0] * torch.inf,))
    if fault == "weight":
        down.weight.data[0, 0] = torch.nan
    yield
    if hook is not None:
        hook.remove()
    down.weight.data[0, 0] = kept


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
    for fault in job["faults"]:
        with spoilt(engine, fault) if here else nullcontext():
            facts = refused(engine, rows, float("nan") if here and fault == "loss" else 1.0)
        if dist.get_rank() == 0:
            Path(f"{job['out']}-{fault}.json").write_text(json.dumps(facts))


def refused(engine: Engine, rows: list[PackedBatch], factor: float) -> list[Any]:
    """Of every rank: what a step is refused with, and whether weights and optimizer keep every bit."""
    before, message = state(engine), ""
    try:
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
    return facts


if __name__ == "__main__":
    run_jobs(run)
