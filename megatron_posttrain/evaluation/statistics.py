"""What samples say about a model: pass@k, majority votes, intervals over prompts, paired differences."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

_Z = NormalDist().inv_cdf
Z95, Z80 = _Z(0.975), _Z(0.8)


def wilson_interval(fraction: float, n: float, z: float = 1.959964) -> tuple[float, float]:
    """Score interval of a proportion `fraction` of `n` trials (Wilson 1927); z = 1.96 is 95%."""
    if n == 0:
        return 0.0, 1.0
    center = (fraction + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(fraction * (1 - fraction) / n + z * z / (4 * n * n))
    return max(0.0, center - half), min(1.0, center + half)


def clustered_interval(shares: Sequence[float], samples: int) -> tuple[float, float]:
    """95% interval of the mean of prompts' shares of correct responses, `samples` each: prompts are the clusters.

    Wilson's, with the number of independent trials that has the clustered standard error (Miller 2024, arXiv
    2411.00640, equation 4): it stays within 0 and 1 and holds where nearly all or none are correct. Few prompts widen
    it as Student's t does.
    """
    mean, count = fmean(shares), len(shares)
    spread = stdev(shares) ** 2 / count if count > 1 else 0.0
    trials = min(mean * (1 - mean) / spread, count * samples) if spread else count
    return wilson_interval(mean, trials, Z95 * (1 + (Z95**2 + 1) / (4 * max(1, count - 1))))


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Probability that one of k responses, drawn from `samples` of which some are correct, is correct.

    Unbiased (Chen et al. 2021, arXiv 2107.03374, equation 1).
    """
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


def majority(answers: Sequence[str], correct: Sequence[bool]) -> float:
    """Whether the most frequent answer is correct; between equally frequent ones, the chance of a random choice."""
    votes: dict[str, list[bool]] = defaultdict(list)
    for answer, right in zip(answers, correct, strict=True):
        votes[answer].append(right)
    most = max(map(len, votes.values()))
    return fmean(fmean(rights) for rights in votes.values() if len(rights) == most)


@dataclass(frozen=True)
class PairedDifference:
    """Of two models' mean values on the same prompts, second less first; the interval is at 95%."""

    prompts: int
    first: float
    second: float
    difference: float
    low: float
    high: float
    p_value: float  # two-sided, normal
    detectable: float  # the smallest true difference that such prompts show with 80% power at the 5% level


def paired_difference(first: Sequence[float], second: Sequence[float]) -> PairedDifference:
    """Each prompt's mean value under both models; the differences' spread is what counts (arXiv 2411.00640, eq. 7)."""
    pairs = [b - a for a, b in zip(first, second, strict=True)]
    mean = fmean(pairs)
    error = stdev(pairs) / math.sqrt(len(pairs)) if len(pairs) > 1 else math.nan
    p_value = 2 * NormalDist().cdf(-abs(mean) / error) if error > 0 else float(mean == 0)
    half = Z95 * error
    return PairedDifference(
        len(pairs), fmean(first), fmean(second), mean, mean - half, mean + half, p_value, (Z95 + Z80) * error
    )
