"""A job whose last ranks only generate: trainers and rollout ranks are a world each, with one group over both.

So everything that speaks to all ranks speaks to the trainers alone, or to the rollout ranks alone.
"""

import datetime
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch.distributed import PrefixStore, distributed_c10d

from megatron_posttrain import failure
from megatron_posttrain.platform import platform


@dataclass
class Bridge:
    """`group`: of all ranks of the job, the `trainers` first; None: every rank of the world trains and generates."""

    group: dist.ProcessGroup | None = None
    trainers: int = 0
    store: Any = None  # the job's
    orders: int = 0  # so far

    @property
    def generates(self) -> bool:
        """Whether this is a rollout rank."""
        return self.group is not None and self.group.rank() >= self.trainers

    def tell(self, value: Any, *, back: bool = False) -> Any:
        """Collective: what the first trainer gives, or (`back`) the first rollout rank, on every rank."""
        if self.group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, self.trainers if back else 0, self.group)
        return box[0]

    def order(self, what: str = "", number: int = 0) -> tuple[str, int]:
        """Collective: what trainers want of rollout ranks next, on every rank."""
        if self.group is not None and self.group.rank() == 0:
            self.store.set(f"order/{self.orders}", what)
            if self.orders:
                self.store.delete_key(f"order/{self.orders - 1}")  # which all have heard
        self.orders += 1
        return self.tell((what, number))

    def announced(self) -> str:
        """What the next order will be, where a rollout rank would not wait for it; else nothing."""
        key = f"order/{self.orders}"
        return self.store.get(key).decode() if self.store.check([key]) else ""


def join(rollout_ranks: int, timeout: datetime.timedelta) -> Bridge:
    """Makes this rank's default group, of trainers or of rollout ranks, and the bridge."""
    store, rank, ranks = next(dist.rendezvous("env://", timeout=timeout))
    failure.job_store = store
    trainers = ranks - rollout_ranks
    first, size = (0, trainers) if rank < trainers else (trainers, rollout_ranks)
    device = platform()
    own = PrefixStore(f"world_{first}", store)
    dist.init_process_group(device.backend, store=own, rank=rank - first, world_size=size, timeout=timeout)
    # What init_process_group does for a default group, once more: `new_group` makes groups of its ranks only.
    backends = ",".join(sorted({"cpu:gloo", f"{device.device.type}:{device.backend}"}))
    make: Any = distributed_c10d._new_process_group_helper
    group, _ = make(ranks, rank, [], backends, PrefixStore("bridge", store), "bridge", timeout=timeout)
    distributed_c10d._world.pg_group_ranks[group] = {number: number for number in range(ranks)}
    return Bridge(group, trainers, store)
