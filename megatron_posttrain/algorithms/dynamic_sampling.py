"""Dynamic sampling (DAPO, arXiv 2503.14476, eq. 11): prompts whose samples all have one reward teach nothing, others
take their place."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from megatron_posttrain.algorithms.curriculum import Curriculum
from megatron_posttrain.data.dataset import Prompt, PromptDataset
from megatron_posttrain.rollout.regroup import join
from megatron_posttrain.rollout.samples import Samples


def replace_equal(
    samples: Samples,
    prompts: Sequence[Prompt],
    dataset: PromptDataset | Curriculum,
    seed: Sequence[int],
    batches: int,
    collect: Callable[[list[Prompt], int], Samples],
) -> Samples:
    """Collective: samples of as many prompts, those with unequal rewards first; with equal ones where `batches` are
    not enough, or no prompt is left.

    Args:
        samples: of `prompts`, the first batch.
        seed: of this step's choice of further prompts, so that a resumed run makes the same.
        collect: the samples of the batch with this number.
    """
    wanted, size = len(prompts), len(samples.prompts) // len(prompts)
    parts, asked = [samples], {prompt.index for prompt in prompts}
    for number in range(1, batches):
        found = sum(int(_unequal(part, size).sum()) for part in parts)
        left = [prompt for prompt in dataset.prompts if prompt.index not in asked]
        if found >= wanted or not left:
            break
        # As many as should be enough at the rate seen so far
        count = min(wanted, math.ceil((wanted - found) * len(asked) / max(1, found)))
        further = [left[i] for i in np.random.default_rng([*seed, number]).permutation(len(left))[:count]]
        asked |= {prompt.index for prompt in further}
        parts.append(collect(further, number))
    groups = [(part, group, useful) for part in parts for group, useful in enumerate(_unequal(part, size))]
    chosen = sorted(groups, key=lambda group: not group[2])[:wanted]
    figures = {
        "generated_batches": float(len(parts)),
        "generated_reward": float(np.concatenate([part.rewards for part in parts]).mean()),
        "equal_fraction": 1 - float(np.mean([useful for *_, useful in groups])),
    }
    return join([(part, group * size + i) for part, group, _ in chosen for i in range(size)], figures)


def _unequal(samples: Samples, size: int) -> np.ndarray:
    """[prompts]"""
    rewards = samples.rewards.reshape(-1, size)
    return (rewards != rewards[:, :1]).any(1)
