"""What is on the device when: optimizer states, gradient buffers, messages of a checkpoint. Here with stand-ins."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_posttrain.algorithms.losses import cross_entropy
from megatron_posttrain.checkpoint.hf import check_directory
from megatron_posttrain.config.algorithms import SftConfig
from megatron_posttrain.config.schema import OptimizerConfig
from megatron_posttrain.data.batch import Sequence
from megatron_posttrain.parallel.groups import make_groups, start_distributed
from megatron_posttrain.parallel.layout import Layout
from megatron_posttrain.training import engine as engine_module
from megatron_posttrain.training import optimizer
from megatron_posttrain.training.batches import rank_micro_batches
from megatron_posttrain.training.engine import Engine
from megatron_posttrain.training.sequences import sequence_logprobs
from megatron_posttrain.training.totals import per_token
from tests.helpers.models import make_qwen3


class Recorder:
    """Whatever is called on it, by name and in order."""

    def __init__(self, calls: list[str], name: str) -> None:
        self._calls, self._name = calls, name

    def __getattr__(self, method: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self._calls.append(f"{self._name}.{method}")
            return True, 1.0, 0

        return call


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Engine, list[str]]]:
    calls: list[str] = []
    made = object.__new__(Engine)
    made._offloaded, made.adapters, made.around, made._calls = False, None, None, 0
    made.arch = None  # type: ignore[assignment]
    made.optimizer_config, made.ema, made.may_skip, made.skipped = OptimizerConfig(), None, 0, 0
    made.groups = SimpleNamespace(data=SimpleNamespace(size=lambda: 1))  # type: ignore[assignment]
    made.chunks = [Recorder(calls, "gradients")]
    made.optimizer = Recorder(calls, "optimizer")
    made.optimizer.param_groups = []
    monkeypatch.setattr(Engine, "_padded", lambda self, batches: list(batches))
    monkeypatch.setattr(engine_module.Totals, "of", lambda batches, group: engine_module.Totals(1, 1, 1))
    monkeypatch.setattr(Engine, "_schedule", lambda self, *args, **kwargs: calls.append("forward and backward"))
    monkeypatch.setattr(Engine, "_total", lambda self, outputs: (1.0, {}))
    monkeypatch.setattr(engine_module, "anywhere", lambda flag: flag)
    device = SimpleNamespace(
        megatron=contextlib.nullcontext,
        release_memory=lambda: calls.append("release"),
        synchronize=lambda: None,
        used_memory_bytes=lambda: 0,
    )
    monkeypatch.setattr(engine_module, "platform", lambda: device)
    return made, calls


def step(engine: Engine) -> None:
    engine.train_step([], cross_entropy, per_token, 1e-3)


def test_states_come_back_after_backward(engine: tuple[Engine, list[str]]) -> None:
    made, calls = engine
    made.offload()
    assert calls == ["gradients.offload_grad_buffers", "optimizer.offload_to_cpu"]
    calls.clear()
    step(made)
    order = [
        "gradients.restore_grad_buffers",
        "gradients.zero_grad_buffer",
        "forward and backward",
        "release",
        "optimizer.restore_from_cpu",
        "optimizer.step",
    ]
    assert [call for call in calls if call in order] == order
    calls.clear()
    step(made)
    assert not any("restore" in call for call in calls), "what is there is not fetched again"


@pytest.fixture
def one_rank() -> Iterator[None]:
    from megatron.core import parallel_state

    start_distributed()
    yield
    parallel_state.destroy_model_parallel()


def buckets(*, overlap: bool, disable: bool) -> list[int]:
    """Elements of each bucket of a stack of small layers."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    modules = [torch.nn.Sequential(*(torch.nn.Linear(64, 64, bias=False) for _ in range(8))) for _ in range(2)]
    core = TransformerConfig(num_layers=1, hidden_size=64, num_attention_heads=1)
    chunks = optimizer.wrap_for_data_parallel(modules, core, overlap=overlap)
    return [b.grad_data.numel() for b in chunks[int(disable)].buffers[0].buckets]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("later_chunk", [False, True])
def test_a_bucket_is_bounded(one_rank: None, monkeypatch: pytest.MonkeyPatch, overlap: bool, later_chunk: bool) -> None:
    """megatron-core makes it the whole buffer without overlap, and in later chunks and pipeline stages."""
    from megatron_posttrain.platform import platform

    make_groups(Layout(), 0)
    monkeypatch.setattr(optimizer, "BUCKET_ELEMENTS", 8_000)
    with platform().megatron():
        sizes = buckets(overlap=overlap, disable=later_chunk)
    assert sum(sizes) == 8 * 64 * 64
    assert max(sizes) <= 8_000 + 64 * 64


COLLECTIVES = ("all_reduce", "all_gather_object", "all_gather_into_tensor", "broadcast", "broadcast_object_list")


def test_no_collective_of_ours_is_in_a_group_of_one(
    one_rank: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The first of a group makes a NCCL communicator: 390 MiB on an H100, also of one rank. The world has one."""
    found: list[str] = []

    def watched(name: str) -> Any:
        original = getattr(dist, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            caller = sys._getframe(1)
            if "megatron_posttrain" in caller.f_code.co_filename and kwargs.get("group") is not None:
                found.append(f"{name} in {caller.f_code.co_qualname}")
            return original(*args, **kwargs)

        return call

    for name in COLLECTIVES:
        monkeypatch.setattr(dist, name, watched(name))
    path = make_qwen3(tmp_path, "moe")
    config = SftConfig.model_validate(
        {"model": {"path": path}, "precision": {"dtype": "fp32"}, "data": {"train": "-"}, "output": str(tmp_path)}
    )
    engine = Engine.of(config, check_directory(path)[1], make_groups(Layout(), 0))
    rows = [[Sequence(list(range(20)), [1] * 20)]]
    sequence_logprobs(engine, rows[0], 64)
    batches = rank_micro_batches(rows, engine.groups, 1)
    engine.train_step(batches, cross_entropy, per_token, 1e-3)
    assert len(list(engine.exporter.hf_tensors())) > 20
    assert found == []


def test_what_is_offloaded_are_not_the_weights(one_rank: None, tmp_path: Path) -> None:
    """With megatron-core's precision-aware optimizer they would be: moving them would cut training off the model."""
    path = make_qwen3(tmp_path, "moe")
    config = SftConfig.model_validate({"model": {"path": path}, "data": {"train": "-"}, "output": str(tmp_path)})
    engine = Engine.of(config, check_directory(path)[1], make_groups(Layout(), 0))
    moved = [
        p for part in engine.optimizer.chained_optimizers for g in part.optimizer.param_groups for p in g["params"]
    ]
    assert len(moved) > 20
    weights = {p.untyped_storage().data_ptr() for module in engine.modules for p in module.parameters()}
    assert weights.isdisjoint(p.untyped_storage().data_ptr() for p in moved)
