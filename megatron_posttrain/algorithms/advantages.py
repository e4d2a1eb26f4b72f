"""Advantages from rewards."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_posttrain.errors import UserError


def group_advantages(
    rewards: Tensor,
    group_size: int,
    *,
    normalize_std: bool = True,
    leave_one_out: bool = False,
    epsilon: float = 1e-6,
) -> Tensor:
    """Reward minus its group's mean, over the group's standard deviation (GRPO, arXiv 2402.03300, section 4.1.2).

    Args:
        rewards: [n], the samples of a prompt one after the other.
        group_size: samples a prompt.
        normalize_std: divide by the unbiased standard deviation + epsilon; off is Dr. GRPO's (arXiv 2503.20783).
        leave_one_out: the baseline is the mean of the group's other samples (RLOO, arXiv 2402.14740).

    Returns:
        [n]; zero for a group whose rewards are all equal.
    """
    if group_size < 1 or rewards.numel() % group_size:
        raise UserError(f"{rewards.numel()} rewards are not divisible into groups of {group_size}")
    groups = rewards.view(-1, group_size)
    advantages = groups - groups.mean(-1, keepdim=True)
    if leave_one_out and group_size > 1:
        advantages = advantages * (group_size / (group_size - 1))
    if normalize_std and group_size > 1:
        advantages = advantages / (groups.std(-1, keepdim=True, unbiased=True) + epsilon)
    # Rounding leaves a mean of equal rewards an ulp away from them; that is no signal.
    same = (groups == groups[:, :1]).all(-1, keepdim=True)
    return torch.where(same, torch.zeros_like(advantages), advantages).view(-1)
