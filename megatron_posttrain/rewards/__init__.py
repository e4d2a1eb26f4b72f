"""Rewards: what a response is worth. A new one is one file here, or one file of the user's."""

from megatron_posttrain.rewards import calls, code, ifeval, judge, language, math, rules
from megatron_posttrain.rewards.grading import Grade, compute_rewards
from megatron_posttrain.rewards.registry import GradingError, Reward, Sample, Score, load_rewards, reward

__all__ = [
    "Grade", "GradingError", "Reward", "Sample", "Score", "calls", "code", "compute_rewards", "ifeval", "judge",
    "language", "load_rewards", "math", "reward", "rules",
]  # fmt: skip
