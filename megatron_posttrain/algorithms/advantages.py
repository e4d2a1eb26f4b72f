"""Advantages from rewards."""

from typing import Literal

import torch
from torch import Tensor

from megatron_posttrain.errors import UserError


def group_advantages(
    rewards: Tensor,
    group_size: int,
    *,
    normalize_std: bool = True,
    leave_one_out: bool = False,
    scale: Literal["group", "batch"] = "group",
    epsilon: float = 1e-6,
) -> Tensor:
    """Reward minus its group's mean, over the group's standard deviation (GRPO, arXiv 2402.03300, section 4.1.2).

    Args:
        rewards: [n], the samples of a prompt one after the other.
        normalize_std: divide by the unbiased standard deviation + epsilon; off is Dr. GRPO's (arXiv 2503.20783).
        leave_one_out: the baseline is the mean of the group's other samples (RLOO, arXiv 2402.14740).
        scale: whose standard deviation; "batch": of all advantages (arXiv 2506.10910, section 2.1).

    Returns [n]; zero for a group whose rewards are all equal.
    """
    if group_size < 1 or rewards.numel() % group_size:
        raise UserError(f"{rewards.numel()} rewards are not divisible into groups of {group_size}")
    groups = rewards.view(-1, group_size)
    advantages = groups - groups.mean(-1, keepdim=True)
    if leave_one_out and group_size > 1:
        advantages = advantages * (group_size / (group_size - 1))
    # Rounding leaves a mean of equal rewards an ulp away from them; that is no signal.
    same = (groups == groups[:, :1]).all(-1, keepdim=True)
    advantages = torch.where(same, torch.zeros_like(advantages), advantages)
    if normalize_std and group_size > 1:
        spread = advantages.std() if scale == "batch" else groups.std(-1, keepdim=True, unbiased=True)
        advantages = advantages / (spread + epsilon)
    return advantages.view(-1)


def generalized_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (arXiv 1506.02438, eq. 16), from a sequence's end to its beginning.

    A token's next one is the next that counts: what an environment said in between is no step. After the last token
    that counts nothing follows, so that its advantage is reward - value.

    Args:
        rewards, values, mask: [batch, sequence] of every token; `mask` is 1 where the policy wrote it.

    Returns advantages and returns (advantage + value), each [batch, sequence], 0 where the mask is.
    """
    counts = mask.bool()
    following = values.new_zeros(len(values))
    advantage = values.new_zeros(len(values))
    found = torch.zeros_like(values)
    for t in reversed(range(values.shape[1])):
        here = rewards[:, t] + gamma * following - values[:, t] + gamma * lam * advantage
        advantage = torch.where(counts[:, t], here, advantage)
        following = torch.where(counts[:, t], values[:, t], following)
        found[:, t] = advantage
    zero = torch.zeros_like(values)
    return torch.where(counts, found, zero), torch.where(counts, found + values, zero)
