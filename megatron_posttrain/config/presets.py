"""`algorithm.preset`: published values for what a config leaves out; an explicit key wins."""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # arXiv 2402.03300, eq. 3, and section 4.2: means of sequences' means, KL of 0.04 in the loss.
    "grpo": {"aggregation": "sequence", "kl_coefficient": 0.04},
    # arXiv 2503.14476: clip-higher, mean over tokens, no KL, overlong filtering (table 1); verl's recipe: at most 10
    # batches. Its soft penalty is the reward `overlong`.
    "dapo": {"clip_low": 0.2, "clip_high": 0.28, "dynamic_sampling": 10, "mask_truncated": True},
    # arXiv 2503.20783: neither length nor standard deviation divide.
    "dr_grpo": {"aggregation": "constant", "normalize_std": False},
    # arXiv 2507.18071, section 5.1.
    "gspo": {"ratio_level": "sequence", "aggregation": "sequence", "clip_low": 3e-4, "clip_high": 4e-4},
    # arXiv 2506.13585, eq. 4, which gives no cap; arXiv 2510.13786 caps the ratio at 5.
    "cispo": {"objective": "cispo", "clip_high": 4.0},
    # arXiv 2402.14740: sums over tokens, the KL in the reward; its weight is TRL's default.
    "rloo": {
        "leave_one_out": True, "normalize_std": False, "aggregation": "constant",
        "kl_in": "reward", "kl_coefficient": 0.05, "kl_estimator": "k1",
    },
    # arXiv 2501.03262: no groups, rewards normalised over the batch's tokens, the KL of every token in the reward.
    "reinforce_plus_plus": {
        "baseline": "batch", "advantage_scale": "batch", "kl_in": "reward", "kl_coefficient": 0.01,
        "kl_estimator": "k1",
    },
}  # fmt: skip
