"""Dynamic sampling (DAPO, arXiv 2503.14476, eq. 11): prompts whose samples all have one reward teach nothing, others
take their place."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

import numpy as np

from megatron_posttrain.data.dataset import Prompt, PromptDataset
from megatron_posttrain.rollout.samples import Samples, join


def further_prompts(
    dataset: PromptDataset, seed: Sequence[int], number: int, count: int, asked: Collection[int]
) -> list[Prompt]:
    """At most `count` that were not asked in this step, whose seed this is: a resumed run draws the same."""
    left = [prompt for prompt in dataset.prompts if prompt.index not in asked]
    order = np.random.default_rng([*seed, number]).permutation(len(left))
    return [left[i] for i in order[:count]]


def replace_equal(
    samples: Samples,
    prompts: Sequence[Prompt],
    batches: int,
    draw: Callable[[int, int, Collection[int]], list[Prompt]],
    collect: Callable[[list[Prompt], int], Samples],
) -> Samples:
    """Collective: samples of as many prompts, those with unequal rewards first; with equal ones where `batches` are
    not enough, or no prompt is left.

    Args:
        samples: of `prompts`, the first batch.
        draw: further prompts: (number of the batch, how many, indices of those that were asked).
        collect: the samples of a batch.
    """
    wanted, size = len(prompts), len(samples.prompts) // len(prompts)
    parts, asked = [samples], {prompt.index for prompt in prompts}
    for number in range(1, batches):
        found = sum(int(_unequal(part, size).sum()) for part in parts)
        if found >= wanted:
            break
        # As many as should be enough at the rate seen so far
        count = min(wanted, math.ceil((wanted - found) * len(asked) / max(1, found)))
        further = draw(number, count, asked)
        if not further:
            break
        asked |= {prompt.index for prompt in further}
        parts.append(collect(further, number))
    kinds = [(part, group, useful) for part, s in enumerate(parts) for group, useful in enumerate(_unequal(s, size))]
    chosen = sorted(kinds, key=lambda kind: not kind[2])[:wanted]
    kept = [[g * size + i for p, g, _ in chosen if p == part for i in range(size)] for part in range(len(parts))]
    figures = {
        "generated_batches": float(len(parts)),
        "generated_reward": float(np.concatenate([part.rewards for part in parts]).mean()),
        "equal_fraction": 1 - float(np.mean([useful for *_, useful in kinds])),
    }
    return join(parts, kept, figures)


def _unequal(samples: Samples, size: int) -> np.ndarray:
    """[prompts]"""
    rewards = samples.rewards.reshape(-1, size)
    return (rewards != rewards[:, :1]).any(1)
