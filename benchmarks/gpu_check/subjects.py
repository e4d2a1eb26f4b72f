"""Models, weights and batches that the checks share; one process group of one rank."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_check.harness import Setting, Skip
from megatron_posttrain.algorithms.losses import cross_entropy
from megatron_posttrain.config.algorithms import SftConfig
from megatron_posttrain.data.batch import Sequence
from megatron_posttrain.models import registry
from megatron_posttrain.models.architecture import Architecture
from megatron_posttrain.models.sharded import local_tensors
from megatron_posttrain.parallel.groups import Groups, make_groups, start_distributed
from megatron_posttrain.parallel.layout import Layout
from megatron_posttrain.planning.known_models import KNOWN_MODELS
from megatron_posttrain.platform import platform
from megatron_posttrain.training.batches import rank_micro_batches
from megatron_posttrain.training.engine import Engine
from megatron_posttrain.training.totals import per_token


@functools.cache
def groups() -> Groups:
    start_distributed()
    return make_groups(Layout(), 0)


def shrunk(name: str, hidden: int, layers: int = 2) -> Architecture:
    """A known model with its structure and other sizes."""
    arch = KNOWN_MODELS[name]
    moe = arch.moe and replace(arch.moe, num_experts=8, top_k=2, expert_ffn_size=hidden)
    sizes = {"hidden_size": hidden, "num_layers": layers, "num_heads": 4, "num_query_groups": 2, "ffn_size": 2 * hidden}
    return replace(arch, **sizes, head_dim=32, vocab_size=512, max_position=512, moe=moe)  # type: ignore[arg-type]


def config(implementation: str, dtype: str = "bf16", fp8: str | None = None) -> SftConfig:
    return SftConfig.model_validate(
        {
            "model": {"path": "none", "random_init": True, "implementation": implementation},
            "precision": {"dtype": dtype, "fp8": fp8},
            "data": {"train": "none"},
            "optimizer": {"lr": 1e-3, "weight_decay": 0.0},
            "output": "none",
        }
    )


def need_transformer_engine() -> None:
    if not platform().has_transformer_engine():
        raise Skip("Transformer Engine is not installed for this device")


def sequences(count: int, length: int, vocabulary: int, seed: int) -> list[Sequence]:
    """Random walks over the vocabulary with small steps, which a model can learn."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(0, 4, (count, length), generator=generator)
    return [Sequence((row.cumsum(0) % vocabulary).tolist(), [1] * length, index=i) for i, row in enumerate(steps)]


def named(modules: Any, arch: Architecture) -> dict[str, Tensor]:
    """A one-rank model's parameters under the names of the weight table, whatever implements its layers."""
    plans = {plan.name: plan for plan in registry.tensors(arch)}
    return {plan.name: tensor for plan, tensor in local_tensors(modules, plans, arch, (0, 1))}


def fill(engine: Engine, values: dict[str, Tensor]) -> None:
    """Copies weights; where training, into the fp32 main weights too."""
    with torch.no_grad():
        for name, tensor in named(engine.modules, engine.arch).items():
            tensor.copy_(values[name])
    if engine.optimizer is not None:
        with platform().megatron():
            engine.optimizer.reload_model_params()


def losses(setting: Setting, of: SftConfig, start: dict[str, Tensor] | None, arch: Architecture) -> list[float]:
    """Training losses, nats a token, from the given weights."""
    engine = Engine.of(of, arch, groups())
    if start is not None:
        fill(engine, start)
    found = []
    for step in range(3 if setting.toy else 50):
        rows = [[s] for s in sequences(4, 64, arch.vocab_size, step)]
        batches = rank_micro_batches(rows, groups(), 2)
        found.append(engine.train_step(batches, cross_entropy, per_token, of.optimizer.lr).loss)
    return found
