"""Where a step's time goes: every phase is timed and named once."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_posttrain.platform import platform
from megatron_posttrain.training import heartbeat


class PhaseTimer:
    """Wall seconds by phase of one step; `with timer("rollout"): ...`. `memory`: also what is held after each."""

    def __init__(self, *, memory: bool = False) -> None:
        self._memory = memory
        self.seconds: dict[str, float] = {}
        self.memory_gib: dict[str, float] = {}
        self._start = time.perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        heartbeat.enter(phase)
        since = time.perf_counter()
        try:
            yield
        except BaseException:
            heartbeat.fail()
            raise
        finally:
            platform().synchronize()
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - since
            if self._memory:
                self.memory_gib[phase] = platform().used_memory_bytes() / 2**30
            heartbeat.leave()

    def total(self) -> float:
        return time.perf_counter() - self._start
