"""GroupedExperts against megatron-core's SequentialMLP, forced onto the CPU, where torch runs the same operation."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_posttrain.config.algorithms import SftConfig
from megatron_posttrain.errors import UserError
from megatron_posttrain.models.architecture import Architecture
from megatron_posttrain.models.build import build_model
from megatron_posttrain.models.layout_checks import check_layout
from megatron_posttrain.models.modules import kernels
from megatron_posttrain.models.modules.experts import GroupedExperts, strided
from megatron_posttrain.parallel.groups import make_groups, start_distributed
from megatron_posttrain.parallel.layout import Layout
from megatron_posttrain.planning.known_models import KNOWN_MODELS
from megatron_posttrain.platform import platform
from megatron_posttrain.training.optimizer import wrap_for_data_parallel

COUNTS = [3, 0, 5, 1, 0, 4, 2, 6]


def architecture(name: str) -> Architecture:
    known = KNOWN_MODELS[name]
    assert known.moe is not None
    return replace(
        known, num_layers=1, hidden_size=64, num_heads=4, num_query_groups=2, head_dim=32, vocab_size=64,
        max_position=64, sliding_layers=(), sliding_window=None,
        moe=replace(known.moe, num_experts=len(COUNTS), top_k=2, expert_ffn_size=48),
    )  # fmt: skip


def config() -> SftConfig:
    return SftConfig.model_validate(
        {"model": {"path": "none"}, "precision": {"dtype": "fp32"}, "data": {"train": "none"}, "output": "none"}
    )


@pytest.fixture(scope="module", autouse=True)
def world() -> Any:
    from megatron.core import parallel_state

    start_distributed()
    make_groups(Layout(), 0)
    yield
    parallel_state.destroy_model_parallel()


def build(name: str) -> Any:
    modules, model_config = build_model(architecture(name), Layout(), config().model, config().precision)
    return modules[0], model_config


def run(experts: Any, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output, and gradients of the input and of the router's weights."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(sum(COUNTS), 64, generator=generator).requires_grad_()
    probs = torch.rand(sum(COUNTS), generator=generator).requires_grad_()
    with platform().megatron():
        out, _ = experts(x, torch.tensor(COUNTS), probs)
        (out * weights).sum().backward()
    assert x.grad is not None
    assert probs.grad is not None
    return out.detach(), x.grad, probs.grad


def formula(experts: Any, x: Tensor, counts: Tensor, probs: Tensor) -> tuple[Tensor, None]:
    """gpt-oss, which stock SequentialMLP cannot train: it adds the bias in place to a custom function's view."""
    out = []
    for expert, rows, p in zip(experts.local_experts, x.split(COUNTS), probs.split(COUNTS), strict=True):
        gate, linear = F.linear(rows, expert.linear_fc1.weight, expert.linear_fc1.bias).chunk(2, dim=-1)
        gate, linear = gate.clamp(max=7.0), linear.clamp(-7.0, 7.0)
        hidden = gate * torch.sigmoid(1.702 * gate) * (linear + 1)
        out.append(p[:, None] * F.linear(hidden, expert.linear_fc2.weight, expert.linear_fc2.bias))
    return torch.cat(out), None


@pytest.mark.parametrize("name", ["Qwen3-30B-A3B", "gpt-oss-20b"])
@pytest.mark.parametrize("data_parallel", [False, True], ids=["plain", "ddp"])
def test_equals_sequential(name: str, data_parallel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and all gradients, experts without tokens, biases, two micro-batches into one main gradient."""
    stock, stock_config = build(name)
    reference: Any = stock.decoder.layers[0].mlp.experts
    monkeypatch.setattr(kernels, "grouped_matmul", lambda dtype: True)
    grouped, grouped_config = build(name)
    ours, theirs = grouped.decoder.layers[0].mlp.experts, reference
    if name == "gpt-oss-20b":
        reference = partial(formula, theirs)
    assert type(ours) is GroupedExperts
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.normal_(0, 0.1)
    grouped.load_state_dict(stock.state_dict(), strict=False)
    if data_parallel:
        with platform().megatron():
            for module, c in ((stock, stock_config), (grouped, grouped_config)):
                module.data_parallel = wrap_for_data_parallel([module], c, overlap=False)  # kept: it owns the gradients
    fc1 = [expert.linear_fc1.weight for expert in ours.local_experts]
    assert strided(fc1) is not None  # no copy of the weights
    weights = torch.randn(sum(COUNTS), 64, generator=torch.Generator().manual_seed(2))
    for _ in range(2):
        for a, b in zip(run(ours, weights), run(reference, weights), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    kind = "main_grad" if data_parallel else "grad"
    expected = dict(theirs.named_parameters())
    for key, parameter in ours.named_parameters():
        torch.testing.assert_close(getattr(parameter, kind), getattr(expected[key], kind), rtol=1e-5, atol=1e-5)
    if data_parallel:
        assert fc1[0].grad_added_to_main_grad
        assert strided([w.main_grad for w in fc1]) is not None


def test_checkpoint_is_interchangeable(monkeypatch: pytest.MonkeyPatch) -> None:
    stock, _ = build("Qwen3-30B-A3B")
    monkeypatch.setattr(kernels, "grouped_matmul", lambda dtype: True)
    grouped, _ = build("Qwen3-30B-A3B")
    with platform().megatron():
        ours, theirs = (m.sharded_state_dict() for m in (grouped, stock))
    describe = {k: (v.key, getattr(v, "global_shape", None), v.replica_id) for k, v in theirs.items() if "experts" in k}
    assert describe
    assert {k: (v.key, getattr(v, "global_shape", None), v.replica_id) for k, v in ours.items() if k in describe} == (
        describe
    )


def test_no_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "grouped_matmul", lambda dtype: True)
    experts = build("Qwen3-30B-A3B")[0].decoder.layers[0].mlp.experts
    with platform().megatron():
        out, _ = experts(torch.empty(0, 64), torch.zeros(len(COUNTS), dtype=torch.long), torch.empty(0))
    assert out.shape == (0, 64)


def test_biased_experts_are_grouped_on_cpu_too() -> None:
    """Stock cannot train them on one rank, and refuses them under expert tensor parallelism."""
    assert type(build("gpt-oss-20b")[0].decoder.layers[0].mlp.experts) is GroupedExperts
    with pytest.raises(UserError, match="splits no experts with biases, so expert_tensor must be 1"):
        check_layout(Layout(2, expert_tensor=2), architecture("gpt-oss-20b"))
