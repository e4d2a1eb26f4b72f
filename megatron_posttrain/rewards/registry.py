"""Rewards by name: built in, or from a user's Python file."""

from __future__ import annotations

import math
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from megatron_posttrain.errors import UserError, nearest
from megatron_posttrain.rewards.response import split_reasoning

if TYPE_CHECKING:
    from megatron_posttrain.config.schema import RewardConfig


@dataclass(frozen=True)
class Sample:
    """One response to grade. `reasoning` and `final` are its parts, split at `</think>` where they are not given."""

    messages: list[dict[str, Any]]  # the prompt
    response: str  # as generated: only the tokens that end it are left out
    answer: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    reasoning: str = ""
    final: str | None = None  # what follows the reasoning: empty when that was cut off; None: find it in `response`

    def __post_init__(self) -> None:
        if self.final is None:
            reasoning, final = split_reasoning(self.response)
            object.__setattr__(self, "reasoning", reasoning)
            object.__setattr__(self, "final", final)


RewardFunction = Callable[[Sample], float]


@dataclass(frozen=True)
class Reward:
    name: str
    weight: float
    function: RewardFunction


_builtin: dict[str, RewardFunction] = {}
_files: dict[Path, dict[str, RewardFunction]] = {}
_registering = _builtin  # where `reward` puts names: the built-in ones, or those of the file being run


def reward(name: str) -> Callable[[RewardFunction], RewardFunction]:
    """Make a function a reward that the configuration can name: `rewards: [{name: NAME, weight: 1.0}]`.

    The function takes a `Sample` and returns a finite number, as a scalar of numpy or torch too. It is called
    from several threads at once.
    """

    def register(function: RewardFunction) -> RewardFunction:
        if name in _registering:
            raise UserError(f"a reward named {name!r} is defined twice")
        _registering[name] = function
        return function

    return register


def load_rewards(specs: Iterable[RewardConfig]) -> list[Reward]:
    """The functions that the configuration names, from their files where it gives one.

    Raises:
        UserError: an unknown name, a file that is missing, fails, or does not define the name, a name twice.
    """
    rewards: list[Reward] = []
    for spec in specs:
        known = _builtin if spec.file is None else _load_file(Path(spec.file), spec.name)
        if spec.name not in known:
            where = "rewards.name" if spec.file is None else f"rewards.file {spec.file}"
            raise UserError(
                f"{where}: no reward named {spec.name!r}{nearest(spec.name, known)}; allowed: "
                f"{', '.join(sorted(known)) or 'none, the file has no @reward(name)'}"
            )
        if spec.name in (r.name for r in rewards):
            raise UserError(f"rewards: {spec.name!r} is there twice")
        rewards.append(Reward(spec.name, spec.weight, known[spec.name]))
    return rewards


def _load_file(path: Path, name: str) -> dict[str, RewardFunction]:
    """The rewards that a file defines; it is run once in a process."""
    global _registering
    if not path.is_file():
        raise UserError(f"rewards.file {path}: no such file (reward {name!r})")
    path = path.resolve()
    if path not in _files:
        _registering = {}
        try:
            module = ModuleType(f"_rewards_{len(_files)}_{path.stem}")
            module.__file__ = str(path)
            sys.modules[module.__name__] = module  # dataclasses and pickle look it up
            exec(compile(path.read_text(), str(path), "exec"), module.__dict__)
            _files[path] = _registering
        except Exception as error:
            raise UserError(f"rewards.file {path} fails: {_last_line(error)}") from error
        finally:
            _registering = _builtin
    return _files[path]


def compute_rewards(
    samples: Sequence[Sample], rewards: Sequence[Reward], *, threads: int = 8
) -> tuple[list[dict[str, float]], list[float]]:
    """Grade every sample with every reward, in a pool of threads.

    Returns:
        each sample's reward by name, and each sample's total: the sum of weight x reward.

    Raises:
        UserError: a reward function fails or returns something else than a finite number.
    """
    jobs = [(sample, item) for sample in samples for item in rewards]
    with ThreadPoolExecutor(threads, thread_name_prefix="reward") as pool:
        values = iter(list(pool.map(_call, jobs)))
    by_name = [{item.name: next(values) for item in rewards} for _ in samples]
    totals = [sum(item.weight * graded[item.name] for item in rewards) for graded in by_name]
    return by_name, totals


def _call(job: tuple[Sample, Reward]) -> float:
    sample, item = job
    try:
        value: Any = item.function(sample)
    except Exception as error:
        raise UserError(f"reward {item.name!r} failed on a sample: {_last_line(error)}") from error
    number = value.item() if getattr(value, "ndim", None) == 0 else value  # a scalar of numpy or torch
    if not isinstance(number, int | float) or not math.isfinite(number):
        raise UserError(f"reward {item.name!r} returned {value!r}; it must return a finite number")
    return float(number)


def _last_line(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, SyntaxError):
        return f"SyntaxError: {error.msg} ({error.filename}:{error.lineno})"
    return f"{type(error).__name__}: {error} ({frames[-1].filename}:{frames[-1].lineno})"
