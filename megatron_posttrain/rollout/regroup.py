"""Samples from several batches, or from other replicas than drew them, as one batch."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from megatron_posttrain.parallel.bridge import Bridge
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


def deal(facts: Samples, parts: Sequence[Samples], replicas: int, tensor: int) -> Samples:
    """A batch as if so many replicas of `tensor` ranks had drawn it. `facts`: what all ranks know of it; `parts`: of
    those of the replicas that drew it whose number, modulo `replicas`, is this rank's replica."""
    own = [(i, part, k) for part in parts for k, i in enumerate(part.drawn)]
    own.sort(key=lambda each: each[0])
    names = OF_DRAWN if dist.get_rank() % tensor == 0 else OF_DRAWN[:3]
    lists: dict[str, Any] = {
        name: [x[k] for _, part, k in own if name in names and (x := getattr(part, name))] for name in OF_DRAWN
    }
    drawn, replica_of = [i for i, _, _ in own], facts.replica_of % replicas
    return replace(facts, drawn=drawn, replica_of=replica_of, ranks_per_replica=tensor, **lists)


def hand_over(bridge: Bridge, samples: Samples | None = None) -> Samples:
    """Collective over the bridge: the samples that rollout ranks give, dealt to the trainers as if each of these were
    a replica. The first rank of a replica sends what it drew, once."""
    nothing: dict[str, Any] = {name: [] for name in ("drawn", *OF_DRAWN)}
    facts = None if samples is None else replace(samples, **nothing)
    facts, rank, trainers = bridge.tell(facts, back=True), dist.get_rank(), bridge.trainers
    tensor = facts.ranks_per_replica
    if samples is not None:
        if rank % tensor == 0:
            part = replace(samples, prompts=[])  # which `facts` has
            dist.send_object_list([part], rank // tensor % trainers, bridge.group)
        return samples
    box: list[Any] = [None]
    parts = []
    for source in range(trainers + rank * tensor, dist.get_world_size(bridge.group), trainers * tensor):
        dist.recv_object_list(box, source, bridge.group)
        parts += box
    return deal(facts, parts, trainers, 1)
