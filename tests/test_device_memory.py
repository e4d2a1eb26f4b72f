"""What is on the device when: optimizer states, gradient buffers, messages of a checkpoint. Here with stand-ins."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_posttrain.config.schema import SftConfig
from megatron_posttrain.parallel.groups import make_groups, start_distributed
from megatron_posttrain.parallel.layout import Layout
from megatron_posttrain.training import engine as engine_module
from megatron_posttrain.training import optimizer
from megatron_posttrain.training.engine import Engine


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
    made._offloaded = False
    made.chunks = [Recorder(calls, "gradients")]
    made.optimizer = Recorder(calls, "optimizer")
    made.optimizer.param_groups = []
    monkeypatch.setattr(Engine, "_padded", lambda self, batches: list(batches))
    monkeypatch.setattr(Engine, "_schedule", lambda self, *args, **kwargs: calls.append("forward and backward"))
    monkeypatch.setattr(Engine, "_total", lambda self, outputs: {"loss": 1.0})
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
    engine.train_step([], lambda output, batch: (torch.zeros(()), {}), 1e-3)


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
    make_groups(Layout(), 0)
    yield
    parallel_state.destroy_model_parallel()


def buckets(tmp_path: Any, *, overlap: bool, disable: bool) -> list[int]:
    """Elements of each bucket of a stack of small layers."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    modules = [torch.nn.Sequential(*(torch.nn.Linear(64, 64, bias=False) for _ in range(8))) for _ in range(2)]
    config = SftConfig.model_validate(
        {"model": {"path": "x"}, "data": {"train": "x"}, "output": str(tmp_path), "parallel": {"overlap": overlap}}
    )
    core = TransformerConfig(num_layers=1, hidden_size=64, num_attention_heads=1)
    chunks = optimizer.wrap_for_data_parallel(modules, core, config)
    return [b.grad_data.numel() for b in chunks[int(disable)].buffers[0].buckets]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("later_chunk", [False, True])
def test_a_bucket_is_bounded(
    one_rank: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Any, overlap: bool, later_chunk: bool
) -> None:
    """megatron-core makes it the whole buffer without overlap, and in later chunks and pipeline stages."""
    from megatron_posttrain.platform import platform

    monkeypatch.setattr(optimizer, "BUCKET_ELEMENTS", 8_000)
    with platform().megatron():
        sizes = buckets(tmp_path, overlap=overlap, disable=later_chunk)
    assert sum(sizes) == 8 * 64 * 64
    assert max(sizes) <= 8_000 + 64 * 64
