"""Grades the samples of a step with every reward of a run, side by side."""

import asyncio
import inspect
import logging
import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cache
from itertools import groupby
from typing import Any

from megatron_posttrain.errors import UserError
from megatron_posttrain.rewards.registry import GradingError, Reward, Sample, Score, last_line

log = logging.getLogger(__name__)
LONGEST_SHOWN = 200  # characters of a response in a message
THREADS = 16  # in which environments answer


class BadValue(GradingError):
    """A reward's function has returned what is no finite number."""


class NoNumber(str):
    """Why a sample has no grade: a `BadValue`."""


@dataclass(frozen=True)
class Grade:
    """What a sample is worth."""

    rewards: dict[str, float]  # by name, without those that failed
    total: float  # sum of weight x reward; with what `on_error` says for one that failed
    masked: bool = False  # it must not train, because a reward could not grade it
    failures: Mapping[str, str] = field(default_factory=dict)  # why, by the reward's name
    metrics: Mapping[str, float] = field(default_factory=dict)  # figures that rewards log, as `REWARD/NAME`


class Grading:
    """Grades samples as they come: a reward of single samples begins at once, others when all are there.

    Plain functions run in at most `threads` threads, coroutines all at once. A reward that raises, returns something
    else than a finite number or takes too long is logged with its first sample and ends nothing.
    """

    def __init__(self, rewards: Sequence[Reward], threads: int = 8) -> None:
        self.rewards, self._gate = rewards, asyncio.Semaphore(threads)
        self._samples: dict[int, Sample] = {}
        self._begun: dict[tuple[str, int], Future[list[Score] | str]] = {}

    def add(self, number: int, sample: Sample) -> None:
        self._samples[number] = sample
        for item in self.rewards:
            if item.per == "sample":
                self._begun[item.name, number] = self._begin(item, [sample])

    def _begin(self, item: Reward, samples: list[Sample]) -> Future[list[Score] | str]:
        return asyncio.run_coroutine_threadsafe(_grade(item, samples, self._gate), _loop())

    def grades(self, numbers: Sequence[int]) -> tuple[list[Sample], list[Grade]]:
        """These samples, of which those of a prompt come one after the other, and what they are worth."""
        samples = [self._samples[number] for number in numbers]
        units = [(item, unit) for item in self.rewards for unit in _units(item, samples)]
        for item, unit in units:
            if item.per != "sample":
                self._begun[item.name, numbers[unit[0]]] = self._begin(item, [samples[i] for i in unit])
        scores: list[dict[str, Score | str]] = [{} for _ in samples]
        for item, unit in units:
            result = self._begun[item.name, numbers[unit[0]]].result()
            for k, i in enumerate(unit):
                scores[i][item.name] = result if isinstance(result, str) else result[k]
        _log_failures(samples, self.rewards, scores)
        return samples, [_combine(self.rewards, scored) for scored in scores]


def compute_rewards(samples: Sequence[Sample], rewards: Sequence[Reward], *, threads: int = 8) -> list[Grade]:
    """Of samples that are all there, see `Grading`; those of a prompt come one after the other."""
    grading = Grading(rewards, threads)
    for number, sample in enumerate(samples):
        grading.add(number, sample)
    return grading.grades(range(len(samples)))[1]


def check_values(rewards: Sequence[Reward], grades: Sequence[Grade]) -> None:
    """Raises UserError for a reward that has given none of a replica's samples a number: its function is wrong."""
    for item in rewards:
        found = [grade.failures.get(item.name) for grade in grades]
        if found and all(isinstance(why, NoNumber) for why in found):
            raise UserError(f"reward {item.name!r} {found[0]} (so for each of {len(found)} samples)")


def metric_sums(grades: Iterable[Grade]) -> dict[str, tuple[float, int]]:
    """Sum and count of each figure that rewards log."""
    sums: dict[str, tuple[float, int]] = {}
    for grade in grades:
        for name, value in grade.metrics.items():
            total, count = sums.get(name, (0.0, 0))
            sums[name] = total + value, count + 1
    return sums


def _units(item: Reward, samples: Sequence[Sample]) -> list[list[int]]:
    """Samples that one call grades."""
    indices = list(range(len(samples)))
    if item.per == "sample":
        return [[i] for i in indices]
    if item.per == "batch":
        return [indices] if indices else []
    return [list(group) for _, group in groupby(indices, lambda i: (samples[i].messages, samples[i].answer))]


def _combine(rewards: Sequence[Reward], scored: Mapping[str, Score | str]) -> Grade:
    failures = {name: score for name, score in scored.items() if isinstance(score, str)}
    done = {name: score for name, score in scored.items() if isinstance(score, Score)}
    return Grade(
        rewards={name: score.value for name, score in done.items()},
        total=sum(r.weight * (done[r.name].value if r.name in done else r.on_error or 0.0) for r in rewards),
        masked=any(r.name in failures and r.on_error is None for r in rewards),
        failures=failures,
        metrics={f"{name}/{key}": float(x) for name, score in done.items() for key, x in score.metrics.items()},
    )


async def _grade(item: Reward, samples: list[Sample], gate: asyncio.Semaphore) -> list[Score] | str:
    """Scores, or why there are none."""
    argument: Any = samples[0] if item.per == "sample" else samples
    try:
        if _is_async(item.function):
            value = await asyncio.wait_for(item.function(argument), item.seconds)
        else:
            async with gate:
                value = await asyncio.wait_for(_in_thread(item.function, argument), item.seconds)
        return [_score(item, one) for one in _results(item, value, len(samples))]
    except TimeoutError:
        return f"took longer than {item.seconds} s"
    except GradingError as error:
        return NoNumber(error) if isinstance(error, BadValue) else str(error)
    except (Exception, SystemExit) as error:
        return last_line(error)


def _is_async(function: Callable[[Any], Any]) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


async def _in_thread(function: Callable[[Any], Any], argument: Any) -> Any:
    """In a thread that the process does not wait for at its end: one that hangs holds up nothing."""
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()  # from here on it cannot be cancelled, as where it took too long

    def call() -> None:
        try:
            future.set_result(function(argument))
        except BaseException as error:
            future.set_exception(error if isinstance(error, Exception) else RuntimeError(last_line(error)))

    threading.Thread(target=call, daemon=True, name="reward").start()
    return await asyncio.wrap_future(future)


def _results(item: Reward, value: Any, count: int) -> Sequence[Any]:
    if item.per == "sample":
        return [value]
    values = value.tolist() if getattr(value, "ndim", 0) == 1 else value
    if not isinstance(values, list | tuple) or len(values) != count:
        raise BadValue(f"returned {value!r:.200}; it must return a list of {count} numbers, one a sample")
    return values


def _score(item: Reward, value: Any) -> Score:
    metrics = value.metrics if isinstance(value, Score) else {}
    plain: Any = value.value if isinstance(value, Score) else value
    number = plain.item() if getattr(plain, "ndim", None) == 0 else plain  # a scalar of numpy or torch
    if not isinstance(number, int | float) or not math.isfinite(number):
        raise BadValue(f"returned {plain!r}; it must return a finite number")
    return Score(float(number), metrics)


def _log_failures(
    samples: Sequence[Sample], rewards: Sequence[Reward], scores: Sequence[Mapping[str, Score | str]]
) -> None:
    for item in rewards:
        if failed := [i for i, scored in enumerate(scores) if isinstance(scored[item.name], str)]:
            then = "are masked" if item.on_error is None else f"count as {item.on_error:g}"
            log.warning(
                "reward %r failed on %d of %d samples, which %s; the first: %s; its response: %r",
                item.name, len(failed), len(samples), then, scores[failed[0]][item.name],
                samples[failed[0]].response[:LONGEST_SHOWN],
            )  # fmt: skip


def in_thread(function: Callable[[Any], Any], argument: Any, seconds: float) -> Future[Any]:
    """`function(argument)` in one of at most `THREADS` threads; TimeoutError where it took longer than `seconds`."""

    async def call() -> Any:
        async with _gate():
            return await asyncio.wait_for(_in_thread(function, argument), seconds)

    return asyncio.run_coroutine_threadsafe(call(), _loop())


@cache
def _gate() -> asyncio.Semaphore:
    return asyncio.Semaphore(THREADS)


@cache
def _loop() -> asyncio.AbstractEventLoop:
    """One event loop for the life of the process, so that a judge's connections stay open between steps."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True, name="rewards").start()
    return loop
