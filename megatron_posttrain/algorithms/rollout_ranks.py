"""Ranks that only generate (`rollout.ranks`): what trainers order, and the loop in which it is done.

The order of a step's events is that of ranks which do both: weights of version s come, then what is missing up to step
s + `rollout.ahead` is drawn with them. Here the trainers go on as soon as they have step s.
"""

import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from megatron_posttrain.algorithms.asked import Asked
from megatron_posttrain.algorithms.draws import Draws
from megatron_posttrain.algorithms.refit import Refits
from megatron_posttrain.config.algorithms import GrpoConfig
from megatron_posttrain.parallel.bridge import Bridge
from megatron_posttrain.parallel.groups import start_distributed
from megatron_posttrain.rollout.in_flight import InFlight
from megatron_posttrain.rollout.regroup import hand_over
from megatron_posttrain.rollout.samples import Samples
from megatron_posttrain.training import heartbeat
from megatron_posttrain.training.prepare import prepare
from megatron_posttrain.training.record import STOP_FILE, beats_of

NEVER = 1e9  # seconds: trainers, which wait for rollout ranks, judge whether one hangs; these wait for orders


@dataclass
class RemoteDraws:
    """`Draws` to a trainer: whatever is asked of it, collectively, is an order to the rollout ranks."""

    bridge: Bridge
    asked: Asked
    state: dict[str, Any]  # of the run's loop

    def take(self, step: int) -> Samples:
        self.bridge.order("take", step)
        return hand_over(self.bridge)

    def held_out(self, step: int) -> Iterator[tuple[str, Samples]]:
        self.bridge.order("held_out", step)
        for name in self.asked.held_out:
            yield name, hand_over(self.bridge)

    def save(self) -> bytes:
        self.bridge.order("save")
        saved, state = self.bridge.tell(None, back=True)
        self.state |= state
        return saved


def serve(config: GrpoConfig) -> int:
    """A rollout rank's part of a command: orders of the trainers, until they leave. Returns their exit status."""
    return _RolloutRank(config).serve()


class _RolloutRank:
    def __init__(self, config: GrpoConfig) -> None:
        prepared = prepare(config)
        self.config, self.asked = config, Asked.of(config, prepared)
        self.bridge = start_distributed(config.rollout_ranks)
        self.refits = Refits(config, prepared, self.bridge)
        steps, self.state, saved = self.bridge.tell(None)
        facts = self.asked, prepared.tokenizer, self.refits.rollout, self.state
        self.draws = Draws(config, steps, *facts)
        self.draws.load(saved)
        self.idle_seconds, self.met = 0.0, 0  # since the last samples were handed over
        if config.rollout.in_flight:
            self.draws.in_flight = InFlight(self.refits.rollout, self.may_follow, self.follow_in_flight)

    def serve(self) -> int:
        for request in (signal.SIGTERM, signal.SIGUSR1):  # a request to stop is the trainers' to follow
            signal.signal(request, lambda *_: (self.config.output_dir / STOP_FILE).touch())
        beats = beats_of(self.config, self.bridge.trainers + dist.get_rank(), self.bridge.trainers)
        since, beat = time.perf_counter(), None
        while (order := self.bridge.order())[0] != "leave":
            self.idle_seconds += time.perf_counter() - since
            what, number = order
            if beat is None:  # by now trainers have theirs, and none of an earlier attempt says that a rank hangs
                beat = heartbeat.Heartbeat(*beats, number + 1, hang_seconds=NEVER)
                beat.start()
            self.follow(what, number)
            if what == "take":
                beat.step(number + 1)
                heartbeat.enter("draw ahead")
                self.draws.draw(number + 1, self.draws.last)
                heartbeat.leave()
            since = time.perf_counter()
        if beat is not None:
            beat.stop()
        self.refits.close()
        return order[1]

    def follow(self, what: str, number: int) -> None:
        heartbeat.enter(what)
        if what == "update":
            self.refits.update(self.config, self.asked.prompts.prompts, number)
        elif what == "take":
            if not self.draws.waiting:
                self.draws.draw(number, number)
            samples = self.draws.pop(number)
            met = {"met_in_flight": self.met} if self.config.rollout.in_flight else {}
            samples.logged |= {"rollout_idle_seconds": self.idle_seconds} | met
            self.idle_seconds, self.met = 0.0, 0
            hand_over(self.bridge, samples)
        elif what == "held_out":
            for _, samples in self.draws.held_out(number):
                hand_over(self.bridge, samples)
        else:
            self.bridge.tell((self.draws.save(), self.state), back=True)
        heartbeat.leave()

    def may_follow(self) -> bool:
        """Whether the next order is there, and one that need not wait for the end of a draw: what is saved is whole,
        and held-out prompts are asked by themselves."""
        what = self.bridge.announced()
        return what == "update" or (what == "take" and bool(self.draws.waiting))

    def follow_in_flight(self) -> None:
        self.met += 1
        self.follow(*self.bridge.order())
