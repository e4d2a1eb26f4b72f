"""Run by test_optimization.py: trains a few steps, some of them not finite on the last rank, averages and saves.

worker.py JOBS.json: [{"model", "layout", "dtype", "optimizer", "out"}]; OUT.pt has the main rank's facts.
"""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_posttrain.config.algorithms import SftConfig
from megatron_posttrain.config.schema import CheckpointConfig
from megatron_posttrain.errors import NotFiniteError
from megatron_posttrain.models.sharded import unwrap
from megatron_posttrain.platform import platform
from megatron_posttrain.training.batches import rank_micro_batches
from megatron_posttrain.training.checkpoints import Checkpoints
from megatron_posttrain.training.engine import Engine
from megatron_posttrain.training.totals import per_token
from megatron_posttrain.training.weight_sets import AVERAGE
from tests.helpers.jobs import engine_of, run_jobs
from tests.helpers.layouts.worker import batch
from tests.helpers.not_finite_worker import loss

BAD = (1, 3, 4, 5)  # steps from 0; the third in a row ends the run


def train(engine: Engine, step: int, *, bad: bool = False) -> Any:
    engine.begin_step(step)
    rows = rank_micro_batches(batch(step, engine.arch.vocab_size), engine.groups, 1)
    here = bad and dist.get_rank() == dist.get_world_size() - 1
    return engine.train_step(rows, partial(loss, float("nan") if here else 1.0), per_token, 1e-2)


def weights(engine: Engine) -> dict[str, Tensor]:
    engine.gather_weights()
    with platform().megatron():
        return {name: tensor.clone() for name, tensor in engine.exporter.hf_tensors()}


def digest(engine: Engine) -> str:
    """Of this rank's weights, main weights and optimizer states."""
    engine.gather_weights()
    tensors = [p.detach() for module in engine.modules for p in module.parameters()]
    for part in engine.optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            for main in group["params"]:
                states = part.optimizer.state[main]
                tensors += [main.detach(), *(states[name] for name in ("exp_avg", "exp_avg_sq", AVERAGE))]
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(tensor.contiguous().view(torch.uint8).numpy())
    return total.hexdigest()


def parameter_groups(engine: Engine) -> dict[str, tuple[float, float]]:
    """Of every parameter of this rank: its weight decay and its learning rate."""
    names = {p: n for module in engine.modules for n, p in unwrap(module).named_parameters()}
    found = {}
    for part in engine.optimizer.chained_optimizers:
        for parameter, (index, _) in part.model_param_group_index_map.items():
            group = part.optimizer.param_groups[index]
            found[names[parameter]] = (group["weight_decay"], group["lr"])
    return found


def save(engine: Engine, out: Path, *, asynchronous: bool) -> Checkpoints:
    checkpoints = Checkpoints(out, CheckpointConfig(asynchronous=asynchronous))
    checkpoints.save(engine, 6)
    return checkpoints


def run(job: dict[str, Any]) -> None:
    config = SftConfig.model_validate(
        {
            "model": {"path": job["model"]},
            "parallel": job["layout"],
            "precision": {"dtype": job["dtype"]},
            "data": {"train": "none"},
            "optimizer": {"lr": 1e-2, **job["optimizer"]},
            "training": {"ema": 0.75, "skip_not_finite": 2},
            "output": job["out"],
        }
    )
    engine = engine_of(config)
    facts: dict[str, Any] = {"skipped": [], "weights": [], "message": ""}
    for step in range(6):
        try:
            facts["skipped"].append(train(engine, step, bad=step in BAD).metrics["skipped"].value)
        except NotFiniteError as error:
            facts["message"] = str(error)
        facts["weights"].append(weights(engine))
    facts["groups"] = parameter_groups(engine)
    before = digest(engine)
    with engine.weights("ema"):
        facts["average"] = weights(engine)
    out = Path(job["out"])
    save(engine, out / "sync", asynchronous=False)
    later = save(engine, out / "async", asynchronous=True)
    same = [before == digest(engine)]
    facts["whole_early"] = (out / "async" / "checkpoints" / "step_000006").exists()
    train(engine, 6)  # what is written must not be what training has made of it meanwhile
    later.finish()
    moved = before != digest(engine)
    later.resume(engine)
    same += [before == digest(engine), engine.skipped == 2, moved]
    every: list[list[bool]] = [same] * dist.get_world_size()
    dist.all_gather_object(every, same)
    facts["same"] = every
    if dist.get_rank() == 0:
        torch.save(facts, f"{job['out']}.pt")


if __name__ == "__main__":
    run_jobs(run)
