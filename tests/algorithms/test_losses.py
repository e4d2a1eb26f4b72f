"""Losses and advantages against their published formulas, written out token by token in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_posttrain.algorithms.advantages import group_advantages
from megatron_posttrain.algorithms.losses import dpo_loss, kl_estimate, policy_gradient_loss
from megatron_posttrain.errors import UserError


def inputs(seed: int = 0, spread: float = 0.5) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    mask = torch.tensor([[0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1], [0, 1, 0, 0, 0, 0], [0, 0, 1, 0, 1, 0]])
    old = -draw(4, 6).abs()
    return {
        "logprobs": (old + spread * draw(4, 6)).requires_grad_(),
        "old_logprobs": old,
        "advantages": draw(4, 1).expand(4, 6).clone(),
        "mask": mask.double(),
        "rollout_logprobs": old + 0.1 * draw(4, 6),
        "reference_logprobs": old + 0.3 * draw(4, 6),
        "entropy": draw(4, 6).abs(),
    }


def formula(x: dict[str, Tensor], o: dict[str, Any]) -> float:
    """The same sums as the papers write them: a loop over sequences and tokens."""
    low, high = o.get("clip_low", 0.2), o.get("clip_high", 0.2)
    total, per_sequence, tokens = 0.0, [], 0
    for i in range(4):
        at = [t for t in range(6) if x["mask"][i, t]]
        log_ratio = {t: (x["logprobs"][i, t] - x["old_logprobs"][i, t]).item() for t in at}
        if o.get("ratio_level") == "sequence":
            mean = sum(log_ratio.values()) / len(at)
            log_ratio = dict.fromkeys(at, mean)
        values = []
        importance = {t: (x["old_logprobs"][i, t] - x["rollout_logprobs"][i, t]).item() for t in at}
        low_high = o.get("sequence_band", (0, math.inf))
        inside = low_high[0] <= math.exp(sum(importance.values()) / len(at)) <= low_high[1]
        for t in at:
            a, r = x["advantages"][i, t].item(), math.exp(log_ratio[t])
            objective = min(r * a, min(max(r, 1 - low), 1 + high) * a)
            if o.get("dual_clip") and a < 0:
                objective = max(objective, o["dual_clip"] * a)
            if o.get("objective") == "cispo":
                # The value's ratio has no gradient: `fixed` is where the ratio was before logprobs moved
                fixed = math.exp((o.get("fixed", x)["logprobs"][i, t] - x["old_logprobs"][i, t]).item())
                objective = min(fixed, 1 + high) * a * x["logprobs"][i, t].item()
            if o.get("importance_cap"):
                whole = o.get("importance_level") == "sequence"
                weight = math.exp(sum(importance.values()) if whole else importance[t])
                objective *= min(weight, o["importance_cap"])
            low_high = o.get("token_band", (0, math.inf))
            objective *= inside * (low_high[0] <= math.exp(importance[t]) <= low_high[1])
            d = (x["reference_logprobs"][i, t] - x["logprobs"][i, t]).item()
            kl = {"k1": -d, "k2": d * d / 2, "k3": math.exp(d) - d - 1}[o.get("kl_estimator", "k3")]
            bonus = o.get("entropy_coefficient", 0.0) * x["entropy"][i, t].item()
            values.append(-objective + o.get("kl_coefficient", 0.0) * kl - bonus)
        total, tokens = total + sum(values), tokens + len(values)
        per_sequence.append(sum(values) / len(values))
    return {"token": total / tokens, "sequence": sum(per_sequence) / 4, "constant": total / 24}[
        o.get("aggregation", "token")
    ]


OPTIONS: list[dict[str, Any]] = [
    {},
    {"clip_low": 0.1, "clip_high": 0.28},
    {"dual_clip": 3.0},
    {"dual_clip": 1.2},
    {"ratio_level": "sequence"},
    {"aggregation": "sequence"},
    {"aggregation": "constant"},
    {"importance_cap": 1.05},
    {"importance_cap": 1.05, "importance_level": "sequence"},
    {"token_band": (0.9, 1.1)},
    {"sequence_band": (0.99, 1.05)},
    {"importance_cap": 1.05, "token_band": (0.9, 1.1), "sequence_band": (0.9, 1.05)},
    {"entropy_coefficient": 0.01},
    {"objective": "cispo", "clip_high": 0.3},
    {"kl_coefficient": 0.1},
    {"kl_coefficient": 0.1, "kl_estimator": "k1"},
    {"kl_coefficient": 0.1, "kl_estimator": "k2"},
    {"ratio_level": "sequence", "aggregation": "sequence", "clip_low": 3e-4, "clip_high": 4e-4},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_policy_gradient_loss_is_the_formula(options: dict[str, Any]) -> None:
    x = inputs()
    loss, metrics = policy_gradient_loss(**x, **options)
    assert loss.item() == pytest.approx(formula(x, options), rel=1e-12)
    importance = (x["old_logprobs"] - x["rollout_logprobs"]).exp()[x["mask"] != 0]
    assert importance.min() < 0.9 < 1.1 < importance.max()  # or the bands would not be tested
    assert 0 <= metrics["clip_fraction"].item() <= x["mask"].sum().item()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_its_gradient_is_the_numerical_one(options: dict[str, Any]) -> None:
    x = inputs(seed=3)
    loss, _ = policy_gradient_loss(**x, **options)
    (gradient,) = torch.autograd.grad(loss, x["logprobs"])
    step = 1e-6
    for i, t in [(0, 2), (1, 3), (3, 4)]:
        moved = []
        for sign in (1, -1):
            y = dict(x)
            y["logprobs"] = x["logprobs"].detach().clone()
            y["logprobs"][i, t] += sign * step
            moved.append(formula(y, options | {"fixed": x}))
        assert gradient[i, t].item() == pytest.approx((moved[0] - moved[1]) / (2 * step), abs=1e-7)
    assert gradient[x["mask"] == 0].abs().max() == 0


def test_parts_of_a_batch_add_up_with_a_common_denominator() -> None:
    x = inputs()
    whole, _ = policy_gradient_loss(**x)
    tokens = x["mask"].sum()
    parts = [policy_gradient_loss(**{k: v[i : i + 2] for k, v in x.items()}, denominator=tokens)[0] for i in (0, 2)]
    torch.testing.assert_close(sum(parts), whole)


def test_wild_ratios_stay_finite() -> None:
    x = inputs()
    x["logprobs"] = torch.full((4, 6), 500.0, dtype=torch.float64, requires_grad=True)
    loss, _ = policy_gradient_loss(**x, kl_coefficient=0.1)
    assert torch.isfinite(loss)
    assert torch.isfinite(torch.autograd.grad(loss, x["logprobs"])[0]).all()


def test_what_is_missing_is_named() -> None:
    x = inputs()
    for name in ("rollout_logprobs", "reference_logprobs"):
        x.pop(name)
    with pytest.raises(UserError, match="rollout_logprobs"):
        policy_gradient_loss(**x, importance_cap=2.0)
    with pytest.raises(UserError, match="reference_logprobs"):
        policy_gradient_loss(**x, kl_coefficient=0.1)
    with pytest.raises(UserError, match="dual_clip"):
        policy_gradient_loss(**x, dual_clip=0.9)


def test_k3_is_never_negative_and_all_estimate_the_divergence() -> None:
    g = torch.Generator().manual_seed(1)
    p, q = (torch.randn(8, generator=g, dtype=torch.float64).log_softmax(0) for _ in range(2))
    exact = (p.exp() * (p - q)).sum()
    assert (kl_estimate(p, q, "k3") >= 0).all()
    for name in ("k1", "k3"):  # unbiased
        assert (p.exp() * kl_estimate(p, q, name)).sum() == pytest.approx(exact.item(), rel=1e-12)


@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize("normalize_std", [False, True])
def test_group_advantages(leave_one_out: bool, normalize_std: bool) -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.5, 0.25, 1.0, 0.0], dtype=torch.float64)
    found = group_advantages(rewards, 4, leave_one_out=leave_one_out, normalize_std=normalize_std)
    for g in range(2):
        group = rewards[4 * g : 4 * g + 4].tolist()
        mean = sum(group) / 4
        std = math.sqrt(sum((r - mean) ** 2 for r in group) / 3)
        for j, r in enumerate(group):
            baseline = (sum(group) - r) / 3 if leave_one_out else mean
            expected = (r - baseline) / ((std + 1e-6) if normalize_std else 1.0)
            assert found[4 * g + j].item() == pytest.approx(expected, rel=1e-12)


def test_group_advantages_at_the_edges() -> None:
    assert group_advantages(torch.full((6,), 0.1), 3).tolist() == [0.0] * 6
    assert group_advantages(torch.tensor([1.0, 2.0]), 1, leave_one_out=True).tolist() == [0.0, 0.0]
    with pytest.raises(UserError, match="groups of 4"):
        group_advantages(torch.zeros(6), 4)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_dpo_loss(smoothing: float) -> None:
    g = torch.Generator().manual_seed(2)
    c, r, rc, rr = (torch.randn(5, generator=g, dtype=torch.float64) for _ in range(4))
    loss, metrics = dpo_loss(c, r, rc, rr, beta=0.3, label_smoothing=smoothing)
    terms = []
    for i in range(5):
        h = 0.3 * ((c[i] - rc[i]) - (r[i] - rr[i])).item()
        right, wrong = 1 / (1 + math.exp(-h)), 1 / (1 + math.exp(h))
        terms.append(-(1 - smoothing) * math.log(right) - smoothing * math.log(wrong))
    assert loss.item() == pytest.approx(sum(terms) / 5, rel=1e-12)
    assert 0 <= metrics["accuracy"].item() <= 1
