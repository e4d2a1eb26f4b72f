"""Where a step's time goes: every phase is timed and named once."""

from __future__ import annotations

import time

from megatron_posttrain.platform import platform
from megatron_posttrain.training import heartbeat


class PhaseTimer:
    """Wall seconds by phase of one step; `with timer("rollout"): ...`. `memory`: also what is held after each."""

    def __init__(self, *, memory: bool = False) -> None:
        self._memory = memory
        self.seconds: dict[str, float] = {}
        self.memory_gib: dict[str, float] = {}
        self._phase = ""
        self._since = 0.0
        self._start = time.perf_counter()

    def __call__(self, phase: str) -> PhaseTimer:
        self._phase = phase
        return self

    def __enter__(self) -> None:
        heartbeat.enter(self._phase)
        self._since = time.perf_counter()

    def __exit__(self, *unused: object) -> None:
        platform().synchronize()
        spent = time.perf_counter() - self._since
        self.seconds[self._phase] = self.seconds.get(self._phase, 0.0) + spent
        if self._memory:
            self.memory_gib[self._phase] = platform().used_memory_bytes() / 2**30
        heartbeat.leave()

    def total(self) -> float:
        return time.perf_counter() - self._start
