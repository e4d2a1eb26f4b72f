"""Orders that rollout ranks follow while they draw, such as new weights, all between two steps of their engines.

What is cut off goes on afterwards: its tokens stay, each with the log-prob under the weights that drew it, and their
keys and values are computed anew, as in AReaL's interruptible generation (arXiv 2505.24298, section 4.1).
"""

import itertools
import time
from collections.abc import Callable

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from megatron_posttrain.rollout.engine import RolloutEngine

POLL_SECONDS = 0.005
_calls = itertools.count()  # of `InFlight`, the same on every rank


class InFlight:
    """Made collectively over rollout ranks. Which order comes in which draw, or after it, one replica decides for all,
    by a value in the store that the first of them sets.

    Args:
        waiting: whether there is an order that may be followed now; asked on first ranks of replicas, where no order
            is ever the next one before the same is true everywhere.
        follow: collective over the ranks; with this rank's engine idle.
    """

    def __init__(self, rollout: RolloutEngine, waiting: Callable[[], bool], follow: Callable[[], None]) -> None:
        self._rollout, self._waiting, self._follow = rollout, waiting, follow
        self._asks = dist.get_rank() % rollout.tensor == 0
        self._store, self._key = _get_default_store(), f"in_flight/{next(_calls)}"
        self._events, self._cut, self._done = 0, False, False

    def due(self) -> bool:
        """Asked after every step of the engine: whether it stops for an order."""
        asked = self._asks and (self._waiting() or self._store.check([self._event]))
        self._cut = self._rollout.share(asked)
        return self._cut

    def go_on(self) -> bool:
        """Collective, where an engine has stopped: follows an order, and the draw goes on; False: all are done."""
        event = self._rollout.share(self._decide(done=not self._cut) if self._asks else b"")
        if self._events and dist.get_rank() == 0:
            self._store.delete_key(f"{self._key}/{self._events - 1}")  # which all have heard
        self._events, self._cut = self._events + 1, False
        if event == b"order":
            self._follow()
            return True
        self._done = False
        return False

    @property
    def _event(self) -> str:
        return f"{self._key}/{self._events}"

    def _decide(self, *, done: bool) -> bytes:
        if done and not self._done:
            self._done = True
            self._store.add(f"{self._key}/done", 1)
        while not self._store.check([self._event]):
            if self._waiting():
                return self._store.compare_set(self._event, "", "order")
            if done and self._store.add(f"{self._key}/done", 0) % self._rollout.replicas == 0:
                return self._store.compare_set(self._event, "", "end")
            time.sleep(POLL_SECONDS)
        return self._store.get(self._event)
