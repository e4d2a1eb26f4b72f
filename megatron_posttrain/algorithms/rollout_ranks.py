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
    prepared = prepare(config)
    asked = Asked.of(config, prepared)
    bridge = start_distributed(config.rollout_ranks)
    refits = Refits(config, prepared, bridge)
    steps, state, saved = bridge.tell(None)
    draws = Draws(config, steps, asked, prepared.tokenizer, refits.rollout, state)
    draws.load(saved)
    for request in (signal.SIGTERM, signal.SIGUSR1):  # a request to stop is the trainers' to follow
        signal.signal(request, lambda *_: (config.output_dir / STOP_FILE).touch())
    beats = beats_of(config, bridge.trainers + dist.get_rank(), bridge.trainers)
    idle, met = 0.0, 0

    def follow(what: str, number: int) -> None:
        nonlocal idle, met
        heartbeat.enter(what)
        if what == "update":
            refits.update(config, asked.prompts.prompts, number)
        elif what == "take":
            if not draws.waiting:
                draws.draw(number, number)
            samples = draws.pop(number)
            samples.logged |= {"rollout_idle_seconds": idle} | ({"met_in_flight": met} if draws.in_flight else {})
            idle, met = 0.0, 0
            hand_over(bridge, samples)
        elif what == "held_out":
            for _, samples in draws.held_out(number):
                hand_over(bridge, samples)
        else:
            bridge.tell((draws.save(), state), back=True)
        heartbeat.leave()

    def follow_in_flight() -> None:
        nonlocal met
        met += 1
        follow(*bridge.order())

    if config.rollout.in_flight:
        # Others wait for the end of a draw: what is saved is whole, and held-out prompts are asked by themselves
        may = {"update": lambda: True, "take": lambda: bool(draws.waiting)}
        draws.in_flight = InFlight(refits.rollout, lambda: may.get(bridge.announced(), bool)(), follow_in_flight)
    since, beat = time.perf_counter(), None
    while (order := bridge.order())[0] != "leave":
        idle += time.perf_counter() - since
        what, number = order
        if beat is None:  # by now trainers have theirs, and none of an earlier attempt says that a rank hangs
            beat = heartbeat.Heartbeat(*beats, number + 1, hang_seconds=NEVER)
            beat.start()
        follow(what, number)
        if what == "take":
            beat.step(number + 1)
            heartbeat.enter("draw ahead")
            draws.draw(number + 1, draws.last)
            heartbeat.leave()
        since = time.perf_counter()
    if beat is not None:
        beat.stop()
    refits.close()
    return order[1]
