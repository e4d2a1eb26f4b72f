"""Samples from several batches, or from other replicas than drew them, as one batch."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from megatron_posttrain.rollout.engine import RolloutEngine
from megatron_posttrain.rollout.samples import Samples

OF_ALL = ("lengths", "sampled", "truncated", "rewards", "masked", "replica_of", "versions")  # arrays [n]
OF_DRAWN = ("token_ids", "logprobs", "experts", "messages", "texts", "grades")  # lists, the last 3 on first ranks


def join(taken: Sequence[tuple[Samples, int]], metrics: dict[str, float]) -> Samples:
    """One batch from several, each sample by its batch and number in it.

    Args:
        metrics: what is logged beside the samples' own; rewards' and environments' are of the first sample's batch.
    """
    first, parts = taken[0][0], {id(part): part for part, _ in taken}
    places = {(key, sample): k for key, part in parts.items() for k, sample in enumerate(part.drawn)}
    found = [(new, part, places.get((id(part), number))) for new, (part, number) in enumerate(taken)]
    mine = [(new, part, k) for new, part, k in found if k is not None]

    def of_all(values: Callable[[Samples], NDArray[Any]]) -> NDArray[Any]:
        return np.array([values(part)[number] for part, number in taken])

    rest: dict[str, Any] = {name: of_all(attrgetter(name)) for name in OF_ALL}
    rest |= {name: [x[k] for _, part, k in mine if (x := getattr(part, name))] for name in OF_DRAWN}
    named = {name: of_all(lambda part, name=name: part.rewards_by_name[name]) for name in first.rewards_by_name}  # type: ignore[misc]
    return replace(
        first,
        prompts=[part.prompts[number] for part, number in taken],
        rewards_by_name=named,
        seconds=sum(part.seconds for part in parts.values()),
        drawn=[new for new, _, _ in mine],
        logged=first.logged | metrics,
        **rest,
    )


def deal(parts: Sequence[Samples], rollout: RolloutEngine) -> Samples:
    """One batch from its parts on all replicas that drew it, as if replicas of `rollout` had drawn it, of which there
    may be more or fewer."""
    own = [(i, part, k) for part in parts[rollout.replica :: rollout.replicas] for k, i in enumerate(part.drawn)]
    own.sort(key=lambda each: each[0])
    names = OF_DRAWN if dist.get_rank() % rollout.tensor == 0 else OF_DRAWN[:3]
    lists: dict[str, Any] = {
        name: [x[k] for _, part, k in own if name in names and (x := getattr(part, name))] for name in OF_DRAWN
    }
    return replace(
        parts[0],
        drawn=[i for i, _, _ in own],
        replica_of=parts[0].replica_of % rollout.replicas,
        ranks_per_replica=rollout.tensor,
        **lists,
    )
