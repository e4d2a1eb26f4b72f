"""Who draws which samples of a step: engines take them as they have room, and it may end before all are complete."""

import itertools
from collections.abc import Sequence

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from megatron_posttrain.rollout.engine import RolloutEngine

_calls = itertools.count()  # of `Handout`, the same on every rank


class Handout:
    """The numbers 0 to `count` - 1, each to one replica. Made collectively; what a sample becomes depends on no order.

    At first every engine takes an equal share of consecutive numbers, as many as it runs at once; of the others whoever
    has room takes the next, by a counter in the job's store.

    Args:
        unit: numbers that are never parted.
        group: samples of a prompt, whose numbers follow one another.
        first: prompts, the first ones, that all must be complete before the step may end.
        wanted: complete prompts with which it ends, those among them; None: all.
    """

    def __init__(
        self, rollout: RolloutEngine, count: int, unit: int, group: int = 1, first: int = 0, wanted: int | None = None
    ) -> None:
        self._rollout, self._count, self._unit, self._group = rollout, count, unit, group
        self._first, self._wanted = first, wanted
        self._store, self._key = _get_default_store(), f"handout/{next(_calls)}"
        self._asks = dist.get_rank() % rollout.tensor == 0
        units = min(-(-count // unit // rollout.replicas), max(1, rollout.at_once // unit))
        begin = rollout.replica * units * unit
        self._own: Sequence[int] = range(begin, min(count, begin + units * unit))
        self._next = units * unit * rollout.replicas  # the first that the counter gives

    def take(self, room: int) -> list[int]:
        """Of this replica, to begin with now; more than there is room for only where a unit is larger."""
        taken, self._own = list(self._own), ()
        while len(taken) < room and self._next < self._count:
            asked = self._store.add(f"{self._key}/units", 1) if self._asks else 0
            begin = self._next + (self._rollout.share(asked) - 1) * self._unit
            if begin >= self._count:
                self._next = self._count
            taken += range(begin, min(self._count, begin + self._unit))
        return taken

    def complete(self, number: int) -> None:
        """A sample is."""
        if self._wanted is None or not self._asks:
            return
        prompt = number // self._group
        if self._store.add(f"{self._key}/{prompt}", 1) == self._group:
            self._store.add(f"{self._key}/{'first' if prompt < self._first else 'others'}", 1)

    def forget(self) -> None:
        """Once all ranks are done: nothing of it stays in the store."""
        if dist.get_rank() == 0:
            groups = range(-(-self._count // self._group)) if self._wanted is not None else ()
            for name in ("units", "first", "others", *groups):
                self._store.delete_key(f"{self._key}/{name}")

    def enough(self) -> bool:
        """Whether the step may end."""
        if self._wanted is None:
            return False
        wanted = {"first": self._first, "others": self._wanted - self._first}
        asked = self._asks and all(self._store.add(f"{self._key}/{name}", 0) >= n for name, n in wanted.items())
        return self._rollout.share(asked)
