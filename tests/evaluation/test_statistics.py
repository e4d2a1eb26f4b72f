"""Figures of an evaluation against simulation and brute force."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest

from megatron_posttrain.evaluation.statistics import clustered_interval, majority, paired_difference, pass_at_k


@pytest.mark.parametrize(("prompts", "samples", "a", "b"), [(30, 16, 2, 1), (200, 4, 0.5, 0.5), (500, 8, 5, 1)])
def test_clustered_intervals_cover_as_promised(prompts: int, samples: int, a: float, b: float) -> None:
    """Prompts of different difficulty, Beta(a, b); naive intervals over all responses would cover far less."""
    random = np.random.default_rng(0)
    right = random.binomial(samples, random.beta(a, b, (1000, prompts)))
    intervals = [clustered_interval((row / samples).tolist(), samples) for row in right]
    assert 0.93 <= np.mean([low <= a / (a + b) <= high for low, high in intervals]) <= 0.97
    assert all(low <= row.mean() / samples <= high for (low, high), row in zip(intervals, right, strict=True))


def test_clustered_interval_at_the_ends() -> None:
    assert clustered_interval([1.0] * 20, 8)[1] == 1
    assert 0.8 < clustered_interval([1.0] * 20, 8)[0] < 0.9  # 20 trials, not 160
    assert clustered_interval([0.5], 2) == pytest.approx((0.0, 1.0), abs=0.1)


@pytest.mark.parametrize("correct", range(7))
@pytest.mark.parametrize("k", range(1, 7))
def test_pass_at_k_is_the_mean_over_all_subsets(correct: int, k: int) -> None:
    draws = list(combinations([1] * correct + [0] * (6 - correct), k))
    assert pass_at_k(6, correct, k) == pytest.approx(np.mean([any(draw) for draw in draws]))


def test_majority_against_brute_force() -> None:
    for answers in product("abc", repeat=5):
        counts = {answer: answers.count(answer) for answer in answers}
        most = [answer for answer in counts if counts[answer] == max(counts.values())]
        assert majority(answers, [answer == "a" for answer in answers]) == pytest.approx(most.count("a") / len(most))


def test_paired_difference_has_its_power_and_size() -> None:
    """At the difference it calls detectable, four of five draws are significant; without one, one in twenty."""
    random = np.random.default_rng(1)
    difficulty = random.beta(2, 2, (1000, 150))
    same = [random.binomial(8, difficulty) / 8 for _ in range(2)]
    found = [paired_difference(a.tolist(), b.tolist()) for a, b in zip(*same, strict=True)]
    assert 0.03 <= np.mean([d.p_value < 0.05 for d in found]) <= 0.07
    assert 0.93 <= np.mean([d.low <= 0 <= d.high for d in found]) <= 0.97
    shift = np.mean([d.detectable for d in found])
    moved = [paired_difference(a.tolist(), (b + shift).tolist()) for a, b in zip(*same, strict=True)]
    assert 0.76 <= np.mean([d.p_value < 0.05 for d in moved]) <= 0.84
    # On the same prompts less can be told apart than on different ones: these differ in difficulty.
    apart = [paired_difference(a.tolist(), b.tolist()) for a, b in zip(same[0], same[1][::-1], strict=True)]
    assert np.mean([d.detectable for d in apart]) > 1.3 * shift
