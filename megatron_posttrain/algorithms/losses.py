"""Losses on log-probabilities. Float tensors are [batch, sequence]; `mask` is 1 where a token counts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_posttrain.data.batch import PackedBatch
from megatron_posttrain.errors import UserError
from megatron_posttrain.training.totals import Mean

Metrics = dict[str, Tensor]
Aggregation = Literal["token", "sequence", "constant"]
KlEstimator = Literal["k1", "k2", "k3"]
RATIO_EXPONENT_LIMIT = 20.0  # exp() of more is no ratio that clipping would let pass, only an overflow


def cross_entropy_terms(logprobs: Tensor, mask: Tensor) -> Tensor:
    """-log p of every token that counts, else 0; fp32, of the arguments' shape."""
    return -(logprobs * mask)


def cross_entropy(output: Mapping[str, Tensor], batch: PackedBatch) -> tuple[Tensor, dict[str, Mean]]:
    """For `Engine.train_step`: the terms of -log p of a micro-batch's tokens."""
    return cross_entropy_terms(output["logprobs"], batch.loss_mask), {}


def policy_gradient_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    ratio_level: Literal["token", "sequence"] = "token",
    aggregation: Aggregation = "token",
    rollout_logprobs: Tensor | None = None,
    importance_cap: float | None = None,
    reference_logprobs: Tensor | None = None,
    kl_coefficient: float = 0.0,
    kl_estimator: KlEstimator = "k3",
    denominator: Tensor | float | None = None,
) -> tuple[Tensor, Metrics]:
    """Clipped policy gradient: GRPO (arXiv 2402.03300, eq. 3) and its published relatives.

    With ratio r = exp(logprobs - old_logprobs) a token's loss is -min(r A, clip(r, 1 - clip_low,
    1 + clip_high) A): PPO's (arXiv 1707.06347, eq. 7), `clip_high` > `clip_low` is DAPO's clip-higher.

    Args:
        logprobs: of the policy that is trained, differentiable.
        old_logprobs: of the policy at the start of the step.
        advantages: of every token.
        dual_clip: c > 1; for negative advantages the loss is at most -c A (arXiv 1912.09729, eq. 5).
        ratio_level: "sequence" uses the geometric mean of a sequence's ratios (GSPO, arXiv 2507.18071).
        aggregation: "token" one mean over all tokens; "sequence" mean of the sequences' means;
            "constant" sum over tokens, divided by batch x sequence (Dr. GRPO, arXiv 2503.20783).
        rollout_logprobs, importance_cap: truncated importance sampling, weight
            min(exp(old - rollout), cap) without gradient.
        reference_logprobs, kl_coefficient, kl_estimator: adds kl_coefficient x KL(policy || reference),
            estimated by k1, k2 or k3 (Schulman 2020).
        denominator: what the sum is divided by, where `logprobs` are a part of a larger batch;
            default: this batch's own count (tokens, sequences, or batch x sequence).

    Returns:
        scalar loss and metrics (sums over tokens that count: `clip_fraction`, `ratio`, `kl`, `old_kl`).

    Raises:
        UserError: dual_clip not above 1, or a KL or importance cap without its log-probs.
    """
    terms, metrics = policy_gradient_terms(
        logprobs,
        old_logprobs,
        advantages,
        mask,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        ratio_level=ratio_level,
        aggregation=aggregation,
        rollout_logprobs=rollout_logprobs,
        importance_cap=importance_cap,
        reference_logprobs=reference_logprobs,
        kl_coefficient=kl_coefficient,
        kl_estimator=kl_estimator,
    )
    return terms.sum() / (own_count(mask, aggregation) if denominator is None else denominator), metrics


def policy_gradient_terms(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    ratio_level: Literal["token", "sequence"] = "token",
    aggregation: Aggregation = "token",
    rollout_logprobs: Tensor | None = None,
    importance_cap: float | None = None,
    reference_logprobs: Tensor | None = None,
    kl_coefficient: float = 0.0,
    kl_estimator: KlEstimator = "k3",
) -> tuple[Tensor, Metrics]:
    """The [batch, sequence] terms whose sum `policy_gradient_loss` divides, and its metrics."""
    _check(dual_clip, rollout_logprobs, importance_cap, reference_logprobs, kl_coefficient)
    mask = mask.to(logprobs.dtype)
    log_ratio = logprobs - old_logprobs
    if ratio_level == "sequence":
        mean = (log_ratio * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
        log_ratio = mean.expand_as(logprobs)
    ratio = log_ratio.clamp(-RATIO_EXPONENT_LIMIT, RATIO_EXPONENT_LIMIT).exp()
    unclipped = -ratio * advantages
    clipped = -ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    losses = torch.maximum(unclipped, clipped)
    was_clipped = (clipped > unclipped).to(mask.dtype)
    if dual_clip is not None:
        losses = torch.where(advantages < 0, torch.minimum(losses, -dual_clip * advantages), losses)
    if importance_cap is not None:
        assert rollout_logprobs is not None
        losses = losses * (old_logprobs - rollout_logprobs).exp().clamp(max=importance_cap).detach()
    metrics = {"clip_fraction": (was_clipped * mask).sum(), "ratio": (ratio * mask).sum()}
    if reference_logprobs is not None:
        divergence = kl_estimate(logprobs, reference_logprobs, kl_estimator)
        metrics["kl"] = (divergence * mask).sum()
        if kl_coefficient:
            losses = losses + kl_coefficient * divergence
    losses = losses * mask
    if aggregation == "sequence":
        losses = losses / mask.sum(-1, keepdim=True).clamp(min=1)
    return losses, {name: value.detach() for name, value in metrics.items()}


def kl_estimate(logprobs: Tensor, reference_logprobs: Tensor, estimator: KlEstimator = "k3") -> Tensor:
    """Per-token estimate of KL(policy || reference) from samples of the policy (Schulman 2020)."""
    difference = reference_logprobs - logprobs
    if estimator == "k1":
        return -difference
    if estimator == "k2":
        return 0.5 * difference.square()
    difference = difference.clamp(-RATIO_EXPONENT_LIMIT, RATIO_EXPONENT_LIMIT)
    return difference.exp() - 1 - difference


def own_count(mask: Tensor, aggregation: Aggregation) -> Tensor | int:
    """Of a [batch, sequence] batch by itself: what its terms are divided by."""
    if aggregation == "token":
        return mask.sum().clamp(min=1)
    if aggregation == "sequence":
        return (mask.sum(-1) > 0).sum().clamp(min=1)
    return mask.numel()


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Metrics]:
    """Direct preference optimization (arXiv 2305.18290, eq. 7).

    Args are [batch] sequence log-probs; `label_smoothing` is the chance that a preference is wrong
    (conservative DPO, Mitchell 2023).
    """
    margin = beta * ((chosen - reference_chosen) - (rejected - reference_rejected))
    losses = -F.logsigmoid(margin) * (1 - label_smoothing) - F.logsigmoid(-margin) * label_smoothing
    metrics = {
        "chosen_reward": beta * (chosen - reference_chosen).mean(),
        "rejected_reward": beta * (rejected - reference_rejected).mean(),
        "margin": margin.mean(),
        "accuracy": (margin > 0).float().mean(),
    }
    return losses.mean(), {name: value.detach() for name, value in metrics.items()}


def _check(
    dual_clip: float | None,
    rollout_logprobs: Tensor | None,
    importance_cap: float | None,
    reference_logprobs: Tensor | None,
    kl_coefficient: float,
) -> None:
    if dual_clip is not None and (dual_clip <= 1 or not math.isfinite(dual_clip)):
        raise UserError(f"dual_clip must be above 1, found {dual_clip}")
    if importance_cap is not None and rollout_logprobs is None:
        raise UserError("importance_cap needs rollout_logprobs")
    if kl_coefficient and reference_logprobs is None:
        raise UserError("kl_coefficient needs reference_logprobs")
