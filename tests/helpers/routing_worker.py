"""Run as ranks by test_routing_replay.py: a mixture of experts trained with given choices under several layouts.

routing_worker.py JOBS.json: [{"model", "layout", "recompute", "action", "out"}]; action `replay` takes the sequences'
own experts, which are drawn at random; `record` takes those of a pass before the first step.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import Tensor

from megatron_posttrain.algorithms.losses import cross_entropy
from megatron_posttrain.config.algorithms import SftConfig
from megatron_posttrain.data.batch import Sequence
from megatron_posttrain.platform import platform
from megatron_posttrain.training.batches import rank_token_batches
from megatron_posttrain.training.engine import Engine
from megatron_posttrain.training.routing import ExpertLoad, routing
from megatron_posttrain.training.sequences import batch_logprobs, sequence_logprobs
from megatron_posttrain.training.totals import per_token
from tests.helpers.jobs import engine_of, run_jobs

LENGTHS = [5, 17, 33, 8, 12, 21]
BUDGET = 48


def sequences(layers: int, experts: int, top_k: int) -> list[Sequence]:
    draw = np.random.default_rng(3)
    out = []
    for index, length in enumerate(LENGTHS):
        chosen = draw.random((length - 1, layers, experts)).argsort(-1)[..., :top_k].astype(np.uint8)
        out.append(Sequence(draw.integers(0, 300, length), [1] * length, index=index, experts=chosen))
    return out


def run(job: dict[str, Any]) -> None:
    config = SftConfig.model_validate(
        {
            "model": {"path": job["model"], "recompute": job["recompute"], "moe": {"load_balancing": "none"}},
            "parallel": job["layout"],
            "precision": {"dtype": "fp32"},
            "data": {"train": "none"},
            "optimizer": {"lr": 1e-2},
            "output": job["out"],
        }
    )
    engine = engine_of(config)
    moe = engine.arch.moe
    assert moe is not None
    given = sequences(engine.arch.num_layers, moe.num_experts, moe.top_k)
    batches = rank_token_batches(given, engine.groups, engine.arch, BUDGET)
    before = routers(engine)
    facts, load = dict[str, Any](losses=[]), ExpertLoad(engine)
    with routing(engine, job["action"]):
        facts["first"] = [x.tolist() for x in sequence_logprobs(engine, given, BUDGET)]
        batch_logprobs(engine, batches, 1.0)
    for step in range(3):
        engine.begin_step(step)
        with routing(engine, job["action"] and "replay"):
            result = engine.train_step(batches, cross_entropy, per_token, 1e-2)
        facts["losses"].append([result.loss, result.grad_norm])
    facts["load"] = load.take()
    facts["moved"] = [float((new - old).abs().max()) for new, old in zip(routers(engine), before, strict=True)]
    if dist.get_rank() == 0:
        Path(job["out"]).write_text(json.dumps(facts))


def routers(engine: Engine) -> list[Tensor]:
    engine.gather_weights()
    with platform().megatron():
        return [tensor.clone() for name, tensor in engine.exporter.hf_tensors() if name.endswith("mlp.gate.weight")]


if __name__ == "__main__":
    run_jobs(run)
