"""Rewards: what a response is worth. A new one is one file here, or one file of the user's."""

from megatron_posttrain.rewards import math
from megatron_posttrain.rewards.registry import Reward, Sample, compute_rewards, load_rewards, reward

__all__ = ["Reward", "Sample", "compute_rewards", "load_rewards", "math", "reward"]
