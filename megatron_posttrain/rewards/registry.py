"""Rewards by name: built in, or from a user's Python file."""

import inspect
import sys
import traceback
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeVar

from pydantic import ConfigDict, ValidationError, create_model

from megatron_posttrain.config.schema import RewardConfig
from megatron_posttrain.errors import UserError, nearest
from megatron_posttrain.rewards.response import split_reasoning


@dataclass(frozen=True)
class Sample:
    """One response to grade. `reasoning` and `final` are its parts, split at `</think>` where they are not given."""

    messages: list[dict[str, Any]]  # the prompt
    response: str  # as generated: only the tokens that end it are left out
    answer: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    reasoning: str = ""
    final: str | None = None  # what follows the reasoning: empty when that was cut off; None: find it in `response`
    tokens: int | None = None  # of the response
    truncated: bool = False  # ended by the limit of tokens

    def __post_init__(self) -> None:
        if self.final is None:
            reasoning, final = split_reasoning(self.response)
            object.__setattr__(self, "reasoning", reasoning)
            object.__setattr__(self, "final", final)


@dataclass(frozen=True)
class Score:
    """What a reward may return instead of a number: with figures of its own, whose means are logged."""

    value: float
    metrics: Mapping[str, float] = field(default_factory=dict)


class GradingError(Exception):
    """A reward cannot tell: the sandbox failed, the judge is down, the row has nothing to grade by."""


Per = Literal["sample", "batch", "group"]
Target = TypeVar("Target", bound=Callable[..., Any])


@dataclass(frozen=True)
class Reward:
    """A reward of a run. `function`, plain or async, takes a sample, or a list of them (to a list of values) where
    `per` says so: all that a replica grades in a step (`batch`), or those of one prompt (`group`)."""

    name: str
    weight: float
    function: Callable[[Any], Any]
    per: Per = "sample"
    on_error: float | None = None  # the value of a sample that could not be graded; None: the sample does not train
    seconds: float | None = None  # after which a call counts as failed; None: never


@dataclass(frozen=True)
class _Definition:
    target: Callable[..., Any]
    per: Per
    needs_answer: bool


_builtin: dict[str, _Definition] = {}
_files: dict[Path, dict[str, _Definition]] = {}
_registering = _builtin  # where `reward` puts names: the built-in ones, or those of the file being run


def reward(name: str, *, per: Per = "sample", needs_answer: bool = False) -> Callable[[Target], Target]:
    """Make a function or a class a reward that the configuration can name: `rewards: [{name: NAME, weight: 1.0}]`.

    A function takes a `Sample` and returns a finite number, as a scalar of numpy or torch too, or a `Score`; plain
    ones are called from several threads at once. Its keyword-only parameters are keys of the config's `args`,
    checked by their types. A class is made once, from `args`, and its instance is called.
    `per`: what a call grades, see `Reward`; `needs_answer`: rows without `answer` are refused.
    """

    def register(target: Target) -> Target:
        if name in _registering:
            raise UserError(f"a reward named {name!r} is defined twice")
        _registering[name] = _Definition(target, per, needs_answer)
        return target

    return register


def load_rewards(specs: Iterable[RewardConfig], *, unsafe: bool = False) -> list[Reward]:
    """The rewards that the configuration names, from their files where it gives one, with their parameters.

    `unsafe`: `sandbox.unsafe`, for those that run programs. Raises UserError for an unknown name or parameter, a bad
    value, a file that is missing, fails, or does not define the name, a name twice.
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
        definition = known[spec.name]
        on_error = None if spec.on_error == "mask" else float(spec.on_error)
        function = _bind(spec.name, definition.target, spec.args, unsafe)
        rewards.append(Reward(spec.name, spec.weight, function, definition.per, on_error, spec.seconds))
    return rewards


def needs_answer(spec: RewardConfig) -> bool:
    """Whether a built-in reward compares with a row's `answer`."""
    return spec.file is None and spec.name in _builtin and _builtin[spec.name].needs_answer


def _bind(name: str, target: Callable[..., Any], args: Mapping[str, Any], unsafe: bool) -> Callable[[Any], Any]:
    """The function of a sample: `target` with its parameters, which its keyword-only arguments declare."""
    made = target.__init__ if isinstance(target, type) else target  # type: ignore[misc]
    hints = typing.get_type_hints(made)
    parameters = [p for p in inspect.signature(made).parameters.values() if p.kind is p.KEYWORD_ONLY]
    defaults = {p.name: ... if p.default is p.empty else p.default for p in parameters}
    fields: dict[str, Any] = {name: (hints.get(name, Any), default) for name, default in defaults.items()}
    given = {"unsafe": True, **args} if unsafe and "unsafe" in fields else dict(args)
    schema = create_model("Parameters", __config__=ConfigDict(extra="forbid", protected_namespaces=()), **fields)
    try:
        checked = schema.model_validate(given)
    except ValidationError as error:
        raise UserError("\n".join(_explain(name, list(fields), e) for e in error.errors())) from None
    values = {key: getattr(checked, key) for key in fields}
    return target(**values) if isinstance(target, type) else partial(target, **values)


def _explain(name: str, allowed: list[str], error: Any) -> str:
    key = ".".join(map(str, error["loc"]))
    where = f"rewards: {name!r}: args.{key}"
    if error["type"] == "extra_forbidden":
        return f"{where} is no parameter of it{nearest(key, allowed)}; allowed: {', '.join(allowed) or 'none'}"
    if error["type"] == "missing":
        return f"{where} is missing; its parameters: {', '.join(allowed)}"
    return f"{where}: {error['msg'][:1].lower() + error['msg'][1:]}, found {error['input']!r}"


def _load_file(path: Path, name: str) -> dict[str, _Definition]:
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
            raise UserError(f"rewards.file {path} fails: {last_line(error)}") from error
        finally:
            _registering = _builtin
    return _files[path]


def last_line(error: BaseException) -> str:
    """An exception in a line: its type, what it says, and the file and line that raised it."""
    if isinstance(error, SyntaxError):
        return f"SyntaxError: {error.msg} ({error.filename}:{error.lineno})"
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"
