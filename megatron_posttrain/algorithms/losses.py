"""Losses on log-probabilities. Float tensors are [batch, sequence]; `mask` is 1 where a token counts."""

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from megatron_posttrain.algorithms.preference_losses import dpo_loss, reward_model_loss
from megatron_posttrain.data.batch import PackedBatch
from megatron_posttrain.errors import UserError
from megatron_posttrain.training.divergence import Divergence
from megatron_posttrain.training.divergence import divergence as token_divergence
from megatron_posttrain.training.totals import Mean

__all__ = ["cross_entropy", "distillation_loss", "dpo_loss", "policy_gradient_loss", "reward_model_loss"]

Metrics = dict[str, Tensor]
Aggregation = Literal["token", "sequence", "constant"]
KlEstimator = Literal["k1", "k2", "k3"]
Objective = Literal["clip", "cispo"]
Level = Literal["token", "sequence"]
Band = tuple[float, float]
RATIO_EXPONENT_LIMIT = 20.0  # exp() of more is no ratio that clipping would let pass, only an overflow


def cross_entropy_terms(logprobs: Tensor, mask: Tensor) -> Tensor:
    """-log p of every token that counts, else 0; fp32, of the arguments' shape."""
    return -(logprobs * mask)


def cross_entropy(
    output: Mapping[str, Tensor], batch: PackedBatch, z_loss: float = 0.0
) -> tuple[Tensor, dict[str, Mean]]:
    """For `Engine.train_step`: the terms of -log p + z_loss log^2 Z of a micro-batch's tokens, Z the normaliser of the
    softmax (PaLM, arXiv 2204.02311, section 5), which needs a head with `normalisers`."""
    terms, mask = cross_entropy_terms(output["logprobs"], batch.loss_mask), batch.loss_mask
    if not z_loss:
        return terms, {}
    squares = output["normalisers"].square() * mask
    return terms + z_loss * squares, {"z_loss": Mean(z_loss * squares.detach().sum(), mask.sum())}


def policy_gradient_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    aggregation: Aggregation = "token",
    denominator: Tensor | float | None = None,
    **options: Any,
) -> tuple[Tensor, Metrics]:
    """Clipped policy gradient: the sum of `policy_gradient_terms`, which tells all options, over `denominator`.

    Args:
        denominator: what the sum is divided by, where `logprobs` are a part of a larger batch;
            default: this batch's own count (tokens, sequences, or batch x sequence).

    Returns scalar loss and metrics.
    """
    terms, metrics = policy_gradient_terms(logprobs, old_logprobs, advantages, mask, aggregation=aggregation, **options)
    return terms.sum() / (own_count(mask, aggregation) if denominator is None else denominator), metrics


def policy_gradient_terms(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    objective: Objective = "clip",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    ratio_level: Level = "token",
    aggregation: Aggregation = "token",
    rollout_logprobs: Tensor | None = None,
    importance_cap: float | None = None,
    importance_level: Level = "token",
    token_band: Band | None = None,
    sequence_band: Band | None = None,
    reference_logprobs: Tensor | None = None,
    kl_coefficient: float = 0.0,
    kl_estimator: KlEstimator = "k3",
    entropy: Tensor | None = None,
    entropy_coefficient: float = 0.0,
) -> tuple[Tensor, Metrics]:
    """[batch, sequence] terms of GRPO's loss (arXiv 2402.03300, eq. 3) and of its published relatives.

    With ratio r = exp(logprobs - old_logprobs) a token's loss is -min(r A, clip(r, 1 - clip_low,
    1 + clip_high) A): PPO's (arXiv 1707.06347, eq. 7), `clip_high` > `clip_low` is DAPO's clip-higher.

    Args:
        logprobs: of the policy that is trained, differentiable.
        old_logprobs: of the policy at the start of the step.
        advantages: of every token.
        objective: "clip" as above; "cispo": -min(r, 1 + clip_high) A logprobs, the ratio without gradient, so that
            no token loses its gradient (MiniMax-M1, arXiv 2506.13585, eq. 4).
        dual_clip: c > 1; for negative advantages the loss is at most -c A (arXiv 1912.09729, eq. 5).
        ratio_level: "sequence" uses the geometric mean of a sequence's ratios (GSPO, arXiv 2507.18071).
        aggregation: "token" one mean over all tokens; "sequence" mean of the sequences' means;
            "constant" sum over tokens, divided by batch x sequence (Dr. GRPO, arXiv 2503.20783).
        rollout_logprobs, importance_cap, importance_level, token_band, sequence_band: as `importance_weights`.
        reference_logprobs, kl_coefficient, kl_estimator: adds kl_coefficient x KL(policy || reference),
            estimated by k1, k2 or k3 (Schulman 2020).
        entropy, entropy_coefficient: subtracts entropy_coefficient x the entropy of a token's distribution.

    Returns terms, and metrics (sums over tokens that count: `clip_fraction`, `ratio`, `kl`). Raises UserError:
    dual_clip not above 1 or with cispo, or a KL or importance option without its log-probs.
    """
    mask = mask.to(logprobs.dtype)
    log_ratio = logprobs - old_logprobs
    if ratio_level == "sequence":
        log_ratio = _mean(log_ratio, mask).expand_as(logprobs)
    ratio = log_ratio.clamp(-RATIO_EXPONENT_LIMIT, RATIO_EXPONENT_LIMIT).exp()
    losses, was_clipped = _clipped(ratio, logprobs, advantages, objective, clip_low, clip_high, dual_clip)
    if importance_cap is not None or token_band is not None or sequence_band is not None:
        if rollout_logprobs is None:
            raise UserError("importance_cap, token_band and sequence_band need rollout_logprobs")
        losses = losses * importance_weights(
            old_logprobs, rollout_logprobs, mask, importance_cap, importance_level, token_band, sequence_band
        )
    metrics = {"clip_fraction": (was_clipped * mask).sum(), "ratio": (ratio * mask).sum()}
    if kl_coefficient and reference_logprobs is None:
        raise UserError("kl_coefficient needs reference_logprobs")
    if reference_logprobs is not None:
        divergence = kl_estimate(logprobs, reference_logprobs, kl_estimator)
        metrics["kl"] = (divergence * mask).sum()
        if kl_coefficient:
            losses = losses + kl_coefficient * divergence
    if entropy_coefficient:
        assert entropy is not None
        losses = losses - entropy_coefficient * entropy
    losses = losses * mask
    if aggregation == "sequence":
        losses = losses / mask.sum(-1, keepdim=True).clamp(min=1)
    return losses, {name: value.detach() for name, value in metrics.items()}


def _clipped(
    ratio: Tensor,
    logprobs: Tensor,
    advantages: Tensor,
    objective: Objective,
    low: float,
    high: float,
    dual_clip: float | None,
) -> tuple[Tensor, Tensor]:
    """The objective's losses, and which tokens were clipped."""
    if objective not in get_args(Objective):
        raise UserError(f"objective must be clip or cispo, found {objective!r}")
    if objective == "cispo":
        if dual_clip is not None:
            raise UserError("dual_clip has no effect on objective cispo")
        return -ratio.clamp(max=1 + high).detach() * advantages * logprobs, ratio > 1 + high
    unclipped, clipped = -ratio * advantages, -ratio.clamp(1 - low, 1 + high) * advantages
    losses, was_clipped = torch.maximum(unclipped, clipped), clipped > unclipped
    if dual_clip is not None:
        if dual_clip <= 1 or not math.isfinite(dual_clip):
            raise UserError(f"dual_clip must be above 1, found {dual_clip}")
        losses = torch.where(advantages < 0, torch.minimum(losses, -dual_clip * advantages), losses)
    return losses, was_clipped


def importance_weights(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    mask: Tensor,
    importance_cap: float | None = None,
    importance_level: Level = "token",
    token_band: Band | None = None,
    sequence_band: Band | None = None,
) -> Tensor:
    """[batch, sequence] without gradient: what losses are multiplied by, since an engine whose log-probs differ from
    the trainer's drew the tokens; with ratio r = exp(old - rollout).

    Args:
        importance_cap: weight min(r, cap); at `importance_level` "sequence" r is the product of a sequence's ratios.
        token_band: 0 for tokens whose r is outside (arXiv 2512.16144).
        sequence_band: 0 for sequences whose geometric mean of r is outside.
    """
    log_ratio = (old_logprobs - rollout_logprobs).detach() * mask
    weights = torch.ones_like(log_ratio)
    if importance_cap is not None:
        exponent = log_ratio if importance_level == "token" else log_ratio.sum(-1, keepdim=True)
        weights = weights * exponent.clamp(max=RATIO_EXPONENT_LIMIT).exp().clamp(max=importance_cap)
    for band, values in ((token_band, log_ratio), (sequence_band, _mean(log_ratio, mask))):
        if band is not None:
            weights = weights * ((values >= math.log(band[0])) & (values <= math.log(band[1])))
    return weights


def value_terms(values: Tensor, old_values: Tensor, returns: Tensor, value_clip: float | None = None) -> Tensor:
    """0.5 (value - return)^2, or where it is larger that of the value clipped to `value_clip` around the old one (PPO's
    reference code; arXiv 2005.12729, section 3); any shape."""
    losses = (values - returns).square()
    if value_clip is not None:
        near = old_values + (values - old_values).clamp(-value_clip, value_clip)
        losses = torch.maximum(losses, (near - returns).square())
    return 0.5 * losses


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """[batch, 1] over the tokens that count."""
    return (values * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)


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


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor,
    *,
    divergence: Divergence = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    denominator: Tensor | float | None = None,
) -> tuple[Tensor, Metrics]:
    """Mean over tokens of a divergence of the student from the teacher; `training.divergence` has the formulas.

    Args:
        student_logits, teacher_logits: [batch, sequence, vocabulary].
        mask: [batch, sequence] 1 where a token counts.
        beta: jsd: the teacher's share of the mixture.
        denominator: what the sum is divided by, where these are a part of a larger batch; default: their own count.

    Returns scalar loss and metrics (`divergence`: sum over tokens that count).
    """
    student, teacher = student_logits.flatten(0, 1), teacher_logits.flatten(0, 1)
    each = token_divergence(student, teacher, divergence, beta=beta, temperature=temperature)
    total = (each * mask.flatten()).sum()
    return total / (own_count(mask, "token") if denominator is None else denominator), {"divergence": total.detach()}
