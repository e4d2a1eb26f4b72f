"""Preference, reward and distillation losses against the papers' formulas as they are written, in float64, and TRL."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_posttrain.algorithms.advantages import generalized_advantages
from megatron_posttrain.algorithms.losses import (
    distillation_loss,
    dpo_loss,
    policy_gradient_loss,
    reward_model_loss,
)
from megatron_posttrain.algorithms.preference_losses import kto_terms
from megatron_posttrain.errors import UserError
from megatron_posttrain.training.divergence import top_k_divergence

N = 7


def pairs(seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    names = ("chosen", "rejected", "reference_chosen", "reference_rejected")
    drawn = {name: -20 * torch.rand(N, generator=g, dtype=torch.float64) - 0.1 for name in names}
    lengths = {f"{name}_lengths": torch.randint(1, 9, (N,), generator=g).double() for name in ("chosen", "rejected")}
    return {**drawn, **lengths}


def s(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def formula(x: dict[str, Tensor], o: dict[str, Any]) -> Tensor:
    """As the papers have it, without a thought for overflow."""
    beta, e, loss = o.get("beta", 0.1), o.get("label_smoothing", 0.0), o.get("loss", "sigmoid")
    n, m = x["chosen_lengths"], x["rejected_lengths"]
    w, l = x["chosen"] - x["reference_chosen"], x["rejected"] - x["reference_rejected"]  # noqa: E741
    if o.get("length_normalized"):
        w, l = w / n, l / m  # noqa: E741
    a, b = x["chosen"] / n, x["rejected"] / m
    d = w - l
    odds_a, odds_b = torch.exp(a) / (1 - torch.exp(a)), torch.exp(b) / (1 - torch.exp(b))
    each: dict[str, Callable[[], Tensor]] = {
        "sigmoid": lambda: -(1 - e) * torch.log(s(beta * d)) - e * torch.log(s(-beta * d)),
        "robust": lambda: ((1 - e) * -torch.log(s(beta * d)) - e * -torch.log(s(-beta * d))) / (1 - 2 * e),
        "ipo": lambda: ((x["chosen"] - x["reference_chosen"]) / n - (x["rejected"] - x["reference_rejected"]) / m
                        - 1 / (2 * beta)) ** 2,
        "apo_zero": lambda: (1 - s(beta * w)) + s(beta * l),
        "apo_down": lambda: s(beta * w) + (1 - s(beta * d)),
        "simpo": lambda: -torch.log(s(beta * (a - b) - o.get("gamma", 0.0))),
        "orpo": lambda: -a - beta * torch.log(s(torch.log(odds_a / odds_b))),
        "kto": lambda: ((1 - s(beta * (w - l.detach().mean().clamp(min=0))))
                        + (1 - s(beta * (w.detach().mean().clamp(min=0) - l)))) / 2,
    }  # fmt: skip
    return each[loss]().mean()


OPTIONS: list[dict[str, Any]] = [
    {},
    {"beta": 0.5},
    {"label_smoothing": 0.2},
    {"length_normalized": True, "beta": 5.0},
    {"loss": "robust"},
    {"loss": "robust", "label_smoothing": 0.1},
    {"loss": "robust", "label_smoothing": 0.1, "length_normalized": True},
    {"loss": "ipo"},
    {"loss": "apo_zero"},
    {"loss": "apo_zero", "length_normalized": True},
    {"loss": "apo_down", "beta": 0.3},
    {"loss": "simpo", "beta": 2.0, "gamma": 1.1},
    {"loss": "orpo"},
    {"loss": "kto"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_dpo_loss_and_its_gradient_are_the_papers(options: dict[str, Any]) -> None:
    x = pairs()
    learned = [x["chosen"].requires_grad_(), x["rejected"].requires_grad_()]
    loss, metrics = dpo_loss(**x, **options)
    expected = formula(x, options)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9, abs=1e-9)
    for ours, theirs in zip(torch.autograd.grad(loss, learned), torch.autograd.grad(expected, learned), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert metrics["chosen_logprobs"].item() == pytest.approx(x["chosen"].mean().item())
    assert metrics["margin"].item() == pytest.approx((metrics["chosen_reward"] - metrics["rejected_reward"]).item())
    assert not metrics["accuracy"].requires_grad


def test_ipo_without_lengths_is_over_whole_answers_and_rewards_are_of_what_the_loss_sees() -> None:
    x = pairs()
    lengths = {name: x.pop(name) for name in ("chosen_lengths", "rejected_lengths")}
    d = x["chosen"] - x["reference_chosen"] - x["rejected"] + x["reference_rejected"]
    assert dpo_loss(**x, loss="ipo")[0].item() == pytest.approx((d - 5).square().mean().item(), rel=1e-12)
    _, metrics = dpo_loss(**x, **lengths, loss="simpo", beta=2.0)
    rewards = 2 * x["chosen"] / lengths["chosen_lengths"], 2 * x["rejected"] / lengths["rejected_lengths"]
    assert metrics["chosen_reward"].item() == pytest.approx(rewards[0].mean().item())
    assert metrics["accuracy"].item() == pytest.approx((rewards[0] > rewards[1]).double().mean().item())


def test_parts_of_a_batch_add_up_with_a_common_denominator() -> None:
    x = pairs()
    parts = [dpo_loss(**{k: v[at] for k, v in x.items()}, denominator=N)[0] for at in (slice(3), slice(3, N))]
    torch.testing.assert_close(sum(parts), dpo_loss(**x)[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "ipo", "label_smoothing": 0.1}, "label_smoothing=0.1 has no effect on ipo"),
        ({"loss": "robust", "label_smoothing": 0.5}, "robust needs less than 0.5"),
        ({"gamma": 1.0}, "gamma=1.0 has no effect on sigmoid"),
        ({"loss": "kto", "length_normalized": True}, "length_normalized has no effect on kto"),
        ({"loss": "simpo", "chosen_lengths": None}, "needs chosen_lengths"),
        ({"loss": "dpo"}, "loss must be one of sigmoid, robust"),
    ],
)
def test_options_that_a_loss_does_not_have_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        dpo_loss(**pairs() | options)


def test_kto_is_the_papers_with_a_divergence_that_is_not_negative() -> None:
    g = torch.Generator().manual_seed(2)
    ratios = torch.randn(N, generator=g, dtype=torch.float64).requires_grad_()
    labels = torch.tensor([1, 0, 1, 1, 0, 0, 1])
    for z in (0.7, -0.7):
        terms, rewards = kto_terms(ratios, labels, z, beta=0.3)
        at = max(z, 0.0)
        expected = torch.where(labels == 1, 1 - s(0.3 * (ratios - at)), 1 - s(0.3 * (at - ratios)))
        torch.testing.assert_close(terms, expected, rtol=1e-9, atol=1e-9)
        ours, theirs = (torch.autograd.grad(x.sum(), ratios)[0] for x in (terms, expected))
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(rewards, 0.3 * ratios.detach())


def test_simpo_and_orpo_are_trls() -> None:
    from trl.experimental.cpo.cpo_trainer import CPOTrainer
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    x = pairs()
    a, b = x["chosen"] / x["chosen_lengths"], x["rejected"] / x["rejected_lengths"]
    trainer = SimpleNamespace(
        alpha=0.0, beta=2.0, simpo_gamma=1.1, label_smoothing=0.0, loss_type="simpo",
        accelerator=SimpleNamespace(device="cpu"),
    )  # fmt: skip
    theirs = CPOTrainer.cpo_loss(trainer, a, b)
    ours, metrics = dpo_loss(**x, loss="simpo", beta=2.0, gamma=1.1)
    assert ours.item() == pytest.approx(theirs[0].mean().item(), rel=1e-9)
    assert metrics["chosen_reward"].item() == pytest.approx(theirs[1].mean().item(), rel=1e-9)
    odds = ORPOTrainer.odds_ratio_loss(trainer, a, b)[0]  # in fp32
    ours, _ = dpo_loss(**x, loss="orpo", beta=2.0)
    assert ours.item() == pytest.approx((-a - odds).mean().item(), rel=1e-5)


@pytest.mark.parametrize("center", [0.0, 0.01])
@pytest.mark.parametrize("with_margin", [False, True])
def test_reward_model_loss_is_bradley_terry(center: float, with_margin: bool) -> None:
    g = torch.Generator().manual_seed(3)
    chosen, rejected = (torch.randn(N, generator=g, dtype=torch.float64).requires_grad_() for _ in range(2))
    margin = torch.rand(N, generator=g, dtype=torch.float64) if with_margin else None
    loss, metrics = reward_model_loss(chosen, rejected, margin=margin, center=center)
    d = chosen - rejected - (margin if margin is not None else 0)
    expected = (-torch.log(s(d)) + center * (chosen + rejected) ** 2).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    for x in (chosen, rejected):
        ours, theirs = (torch.autograd.grad(y, x, retain_graph=True)[0] for y in (loss, expected))
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert metrics["accuracy"].item() == pytest.approx((chosen > rejected).double().mean().item())


# ---- distillation ------------------------------------------------------------------------------------------


def logits(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(2, 5, 11, generator=g, dtype=torch.float64) for _ in range(2))
    mask = torch.tensor([[0, 1, 1, 0, 1], [1, 0, 0, 1, 1]]).double()
    return student.requires_grad_(), teacher, mask


def naive(q: Tensor, p: Tensor, kind: str, beta: float) -> Tensor:
    """Of probabilities, by their definitions."""
    m = beta * p + (1 - beta) * q
    forward, reverse = p * torch.log(p / q), q * torch.log(q / p)
    jsd = beta * p * torch.log(p / m) + (1 - beta) * q * torch.log(q / m)
    return {"forward_kl": forward, "reverse_kl": reverse, "jsd": jsd}[kind].sum(-1)


KINDS = [("forward_kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.5), ("jsd", 0.1), ("jsd", 0.9)]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_distillation_loss_and_its_gradient_are_the_definitions(kind: Any, beta: float, temperature: float) -> None:
    student, teacher, mask = logits()
    loss, metrics = distillation_loss(student, teacher, mask, divergence=kind, beta=beta, temperature=temperature)
    q, p = (torch.exp(x / temperature) for x in (student, teacher))
    each = naive(q / q.sum(-1, keepdim=True), p / p.sum(-1, keepdim=True), kind, beta)
    expected = (each * mask).sum() / mask.sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    assert metrics["divergence"].item() == pytest.approx(expected.item() * mask.sum().item())
    ours, theirs = (torch.autograd.grad(x, student)[0] for x in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_jsd_is_trls(beta: float) -> None:
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    student, teacher, mask = logits()
    labels = torch.where(mask.bool(), 0, -100)
    theirs = GKDTrainer.generalized_jsd_loss(student, teacher, labels, beta=beta, temperature=0.9)
    ours, _ = distillation_loss(student, teacher, mask, divergence="jsd", beta=beta, temperature=0.9)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)  # theirs has the mixture's weights in fp32


@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_the_rest_of_the_mass_is_one_event(kind: Any, beta: float) -> None:
    student, teacher, _ = logits()
    s_flat, t_flat = student.flatten(0, 1), teacher.flatten(0, 1)
    top = t_flat.log_softmax(-1).topk(3)
    ours = top_k_divergence(s_flat, top.indices, top.values, kind, beta=beta)

    def events(x: Tensor) -> Tensor:
        p = torch.exp(x) / torch.exp(x).sum(-1, keepdim=True)
        chosen = p.gather(-1, top.indices)
        rest = torch.ones_like(p).scatter(-1, top.indices, 0.0)
        return torch.cat([chosen, (p * rest).sum(-1, keepdim=True)], -1)

    expected = naive(events(s_flat), events(t_flat), kind, beta)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
    weights = torch.arange(len(ours)).double()
    a, b = (torch.autograd.grad((x * weights).sum(), student)[0] for x in (ours, expected))
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_jsd_at_its_ends_is_refused() -> None:
    student, teacher, mask = logits()
    with pytest.raises(UserError, match="divergence must be one of forward_kl"):
        distillation_loss(student, teacher, mask, divergence="kl")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"found 1\.0; reverse_kl is what"):
        distillation_loss(student, teacher, mask, divergence="jsd", beta=1.0)


# ---- reinforcement learning --------------------------------------------------------------------------------


def test_generalized_advantages_are_a_plain_loops() -> None:
    g = torch.Generator().manual_seed(4)
    rewards, values = (torch.randn(3, 9, generator=g, dtype=torch.float64) for _ in range(2))
    mask = torch.tensor([[0, 0, 1, 1, 1, 0, 0, 1, 1], [1] * 9, [0, 1, 1, 0, 0, 0, 0, 0, 0]])
    advantages, returns = generalized_advantages(rewards, values, mask, gamma=0.9, lam=0.8)
    for i in range(3):
        at = [t for t in range(9) if mask[i, t]]
        for n, t in enumerate(at):
            total = 0.0
            for k, u in enumerate(at[n:]):  # sum over k of (gamma lambda)^k delta
                following = values[i, at[n + k + 1]].item() if n + k + 1 < len(at) else 0.0
                total += (0.9 * 0.8) ** k * (rewards[i, u].item() + 0.9 * following - values[i, u].item())
            assert advantages[i, t].item() == pytest.approx(total, abs=1e-9)
            assert returns[i, t].item() == pytest.approx(total + values[i, t].item(), abs=1e-9)
    assert advantages[mask == 0].abs().max() == returns[mask == 0].abs().max() == 0


def test_cispo_weighs_every_tokens_gradient_by_its_capped_ratio() -> None:
    g = torch.Generator().manual_seed(5)
    old = -torch.rand(3, 6, generator=g, dtype=torch.float64)
    logprobs = (old + torch.randn(3, 6, generator=g, dtype=torch.float64) / 2).requires_grad_()
    advantages = torch.randn(3, 1, generator=g, dtype=torch.float64).expand(3, 6)
    mask = torch.tensor([[0, 1, 1, 1, 0, 0], [1] * 6, [0, 0, 0, 1, 1, 0]]).double()
    loss, metrics = policy_gradient_loss(logprobs, old, advantages, mask, objective="cispo", clip_high=0.3)
    ratio = torch.exp(logprobs.detach() - old)
    weight = ratio.clamp(max=1.3)
    expected = (-weight * advantages * logprobs.detach() * mask).sum() / mask.sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    torch.testing.assert_close(gradient, -weight * advantages * mask / mask.sum(), rtol=1e-9, atol=1e-9)
    assert metrics["clip_fraction"].item() == ((ratio > 1.3) * mask).sum().item() > 0
    with pytest.raises(UserError, match="dual_clip has no effect on objective cispo"):
        policy_gradient_loss(logprobs, old, advantages, mask, objective="cispo", dual_clip=3.0)
    with pytest.raises(UserError, match="clip or cispo, found 'ppo'"):
        policy_gradient_loss(logprobs, old, advantages, mask, objective="ppo")  # type: ignore[arg-type]
