"""Losses on preferences: of answers' log-probabilities (dpo and its relatives, kto) and of their rewards."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_posttrain.config.algorithms import WITHOUT_REFERENCE, PreferenceLoss, preference_problems
from megatron_posttrain.errors import UserError

Metrics = dict[str, Tensor]
PER_TOKEN = ("ipo", "simpo", "orpo")  # on means of log-probs over an answer's tokens


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    denominator: Tensor | float | None = None,
    **options: Any,
) -> tuple[Tensor, Metrics]:
    """Mean over pairs of a preference loss on answers' log-probs; `dpo_terms` has the formulas and all options.

    Args:
        chosen, rejected: [batch] summed log-probs of the answers under the policy, differentiable.
        reference_chosen, reference_rejected: [batch] under the reference; simpo and orpo do not read them.
        denominator: what the terms' sum is divided by, where these are a part of a larger batch; default: batch.

    Returns:
        scalar loss, and means over these pairs of accuracy, margin, chosen_reward, rejected_reward, chosen_logprobs
        and rejected_logprobs.

    Raises UserError: an option that the loss does not have, or lengths that it needs.
    """
    terms, metrics = dpo_terms(chosen, rejected, reference_chosen, reference_rejected, **options)
    return _over_pairs(terms, metrics, denominator)


def dpo_terms(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    loss: PreferenceLoss = "sigmoid",
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    length_normalized: bool = False,
    gamma: float = 0.0,
) -> tuple[Tensor, Metrics]:
    """A term for every pair [batch] of a preference loss, and its metrics [batch] without gradient.

    With w and l the log-ratios policy - reference of the chosen and the rejected answer, d = w - l, e the
    `label_smoothing` and s the logistic function:

        sigmoid   -(1 - e) log s(beta d) - e log s(-beta d)     DPO, arXiv 2305.18290, eq. 7; e > 0: conservative DPO
        robust    (-(1 - e) log s(beta d) + e log s(-beta d)) / (1 - 2 e)     arXiv 2403.00409
        ipo       (d - 1 / (2 beta))^2     arXiv 2310.12036, eq. 17; w and l over the tokens, where lengths are given
        apo_zero  1 - s(beta w) + s(beta l)     arXiv 2408.06266, eq. 7
        apo_down  s(beta w) + 1 - s(beta d)     arXiv 2408.06266, eq. 8
        simpo     -log s(beta (a - b) - gamma)     arXiv 2405.14734, eq. 6
        orpo      -a - beta log s(odds(a) - odds(b)), odds(x) = x - log(1 - exp x)     arXiv 2403.07691, eq. 6
        kto       half the sum of 1 - s(beta (w - mean l)) and 1 - s(beta (mean w - l)), the means at least 0 and
                  without gradient: for pairs, one side estimates the divergence for the other; `kto_terms` is for rows

    a and b are the policy's mean log-probs of the answers' tokens. `length_normalized` divides w and l by the number
    of tokens (arXiv 2411.15124, section 5); `chosen_lengths` and `rejected_lengths` [batch] count them. Rewards are
    beta w and beta l, without a reference beta a and beta b.
    """
    for problem in preference_problems(loss, label_smoothing, length_normalized, gamma):
        raise UserError(problem)
    per_token = length_normalized or loss in PER_TOKEN
    if chosen_lengths is None or rejected_lengths is None:
        if per_token and loss != "ipo":
            raise UserError(f"{loss} over an answer's tokens needs chosen_lengths and rejected_lengths")
        per_token = False
    w, l = chosen, rejected  # noqa: E741
    if loss not in WITHOUT_REFERENCE:
        w, l = w - reference_chosen, l - reference_rejected  # noqa: E741
    if per_token:
        w, l = w / chosen_lengths, l / rejected_lengths  # type: ignore[operator] # noqa: E741
    rewards = beta * w.detach(), beta * l.detach()
    return _terms(loss, w, l, beta, label_smoothing, gamma), {
        "accuracy": (rewards[0] > rewards[1]).to(chosen.dtype),
        "margin": rewards[0] - rewards[1],
        "chosen_reward": rewards[0],
        "rejected_reward": rewards[1],
        "chosen_logprobs": chosen.detach(),
        "rejected_logprobs": rejected.detach(),
    }


def _terms(loss: PreferenceLoss, w: Tensor, l: Tensor, beta: float, smoothing: float, gamma: float) -> Tensor:  # noqa: E741
    """The table of `dpo_terms`."""
    d = w - l
    if loss in ("sigmoid", "robust"):
        right, wrong = -(1 - smoothing) * F.logsigmoid(beta * d), smoothing * F.logsigmoid(-beta * d)
        return right - wrong if loss == "sigmoid" else (right + wrong) / (1 - 2 * smoothing)
    if loss == "ipo":
        return (d - 1 / (2 * beta)).square()
    if loss == "apo_zero":
        return torch.sigmoid(-beta * w) + torch.sigmoid(beta * l)
    if loss == "apo_down":
        return torch.sigmoid(beta * w) + torch.sigmoid(-beta * d)
    if loss == "simpo":
        return -F.logsigmoid(beta * d - gamma)
    if loss == "orpo":
        return -w - beta * F.logsigmoid(log_odds(w) - log_odds(l))
    good, _ = kto_terms(w, torch.ones_like(w), l.detach().mean(), beta=beta)
    bad, _ = kto_terms(l, torch.zeros_like(l), w.detach().mean(), beta=beta)
    return (good + bad) / 2


def kto_terms(
    log_ratios: Tensor, labels: Tensor, divergence: Tensor | float, *, beta: float = 0.1
) -> tuple[Tensor, Tensor]:
    """A term for every labelled answer [batch] (KTO, arXiv 2402.01306, section 4), and its reward beta x log-ratio.

    1 - s(beta (w - z)) of a good answer, 1 - s(beta (z - w)) of a bad one, with w its log-ratio policy - reference and
    z the divergence of the policy from the reference.

    Args:
        log_ratios: [batch], differentiable.
        labels: [batch] 1 for a good answer, 0 for a bad one.
        divergence: estimated as the mean of log-ratios of answers that belong to other prompts; at least 0 is taken.
    """
    z = torch.as_tensor(divergence, dtype=log_ratios.dtype, device=log_ratios.device).detach().clamp(min=0)
    sign = 2 * labels.to(log_ratios.dtype) - 1
    return torch.sigmoid(-beta * sign * (log_ratios - z)), beta * log_ratios.detach()


def log_odds(logprobs: Tensor) -> Tensor:
    """log(p / (1 - p)) of log p < 0, exact for p near 0 and near 1 (log1mexp, Mächler 2012)."""
    near_one = torch.log(-torch.expm1(logprobs))
    far = torch.log1p(-torch.exp(logprobs.clamp(max=-0.5)))
    return logprobs - torch.where(logprobs > -0.693, near_one, far)


def reward_model_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    margin: Tensor | None = None,
    center: float = 0.0,
    denominator: Tensor | float | None = None,
) -> tuple[Tensor, Metrics]:
    """Mean over pairs of the Bradley-Terry loss; `reward_model_terms` has the formula.

    Returns scalar loss, and means over these pairs of accuracy, margin, chosen_reward and rejected_reward.
    """
    terms, metrics = reward_model_terms(chosen, rejected, margin=margin, center=center)
    return _over_pairs(terms, metrics, denominator)


def _over_pairs(terms: Tensor, metrics: Metrics, denominator: Tensor | float | None) -> tuple[Tensor, Metrics]:
    total = terms.sum() / (max(1, len(terms)) if denominator is None else denominator)
    return total, {name: value.mean() for name, value in metrics.items()}


def reward_model_terms(
    chosen: Tensor, rejected: Tensor, *, margin: Tensor | None = None, center: float = 0.0
) -> tuple[Tensor, Metrics]:
    """A term for every pair [batch]: -log s(chosen - rejected - margin) + center (chosen + rejected)^2.

    Bradley-Terry (arXiv 2203.02155, eq. 1) with Llama 2's margin (arXiv 2307.09288, eq. 2), and the centring of
    arXiv 2312.09244 (eq. 2), which fixes the sum that the first term leaves open.

    Args:
        chosen, rejected: [batch] rewards, differentiable.
        margin: [batch] by how much the chosen answer is better.
    """
    difference = chosen - rejected
    terms = -F.logsigmoid(difference if margin is None else difference - margin)
    if center:
        terms = terms + center * (chosen + rejected).square()
    return terms, {
        "accuracy": (difference.detach() > 0).to(chosen.dtype),
        "margin": difference.detach(),
        "chosen_reward": chosen.detach(),
        "rejected_reward": rejected.detach(),
    }
