"""An engine that has nothing but `generate`, such as a caller's own, where `RolloutEngine` is asked for."""

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from megatron_posttrain.rollout.engine import Feed, RolloutEngine, Sampling, Take


class AtOnce:
    """All that it is fed ends before it is asked for more.

    Args:
        engine: has `generate(prompts, sampling, seeds)`, and as in RolloutEngine `tensor`, `replica` and `replicas`;
            the ranks of a replica are one.
    """

    version, choices, at_once = 0, None, sys.maxsize

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.tensor, self.replica, self.replicas = 1, engine.replica, engine.replicas

    def share(self, value: Any) -> Any:
        return value

    def run(self, feed: Feed, take: Take, sampling: Sampling, enough: Callable[[], bool]) -> None:
        """As `RolloutEngine.run`."""
        while not enough() and (new := feed(self.at_once, True)):
            for name, request in new.items():
                limited = replace(sampling, max_tokens=request.limit)
                take(name, self._engine.generate([request.prompt], limited, [request.seed])[0])


def with_run(engine: Any) -> RolloutEngine:
    """The engine itself, where it takes requests while others run."""
    return engine if hasattr(engine, "run") else AtOnce(engine)  # type: ignore[return-value]
