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
    environment_reward: float = 0.0  # what the environment of the conversation gave at its end

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


MODEL = "reward_model"  # the reward that `algorithms` computes, with a model in the trainer's layout
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
class Definition:
    """What a configuration can name: `target` is a function or a class, whose keyword-only parameters are `args`."""

    target: Callable[..., Any]
    per: Per = "sample"
    needs_answer: bool = False


Definitions = dict[tuple[str, str], Definition]  # by (what it is, name)
_builtin: Definitions = {}
_files: dict[Path, Definitions] = {}
_registering = _builtin  # where `define` puts names: the built-in ones, or those of the file being run


def reward(name: str, *, per: Per = "sample", needs_answer: bool = False) -> Callable[[Target], Target]:
    """Make a function or a class a reward that the configuration can name: `rewards: [{name: NAME, weight: 1.0}]`.

    A function takes a `Sample` and returns a finite number, as a scalar of numpy or torch too, or a `Score`; plain
    ones are called from several threads at once. Its keyword-only parameters are keys of the config's `args`,
    checked by their types. A class is made once, from `args`, and its instance is called.
    `per`: what a call grades, see `Reward`; `needs_answer`: rows without `answer` are refused.
    """
    return define("reward", name, per, needs_answer)


def define(kind: str, name: str, *facts: Any) -> Callable[[Target], Target]:
    """Puts a reward or an environment under its name, with further `facts` of its `Definition`. Raises UserError where
    the file has it already."""

    def register(target: Target) -> Target:
        if (kind, name) in _registering:
            raise UserError(f"{kind} {name!r} is defined twice")
        _registering[kind, name] = Definition(target, *facts)
        return target

    return register


def find(kind: str, name: str, file: str | None, key: str) -> Definition:
    """The reward or environment of that name, built in or of a user's file; `key`: of the config, for messages.

    Raises UserError for an unknown name, and a file that is missing or fails.
    """
    known = _builtin if file is None else _load_file(Path(file), f"{kind} {name!r}", key)
    names = sorted(name for of, name in known if of == kind)
    if name not in names:
        where = f"{key}.name" if file is None else f"{key}.file {file}"
        raise UserError(
            f"{where}: no {kind} named {name!r}{nearest(name, names)}; allowed: "
            f"{', '.join(names) or f'none, the file has no @{kind}(name)'}"
        )
    return known[kind, name]


def load_rewards(specs: Iterable[RewardConfig], *, unsafe: bool = False) -> list[Reward]:
    """The rewards that the configuration names, from their files where it gives one, with their parameters; those of
    models apart.

    `unsafe`: `sandbox.unsafe`, for those that run programs. Raises UserError for an unknown name or parameter, a bad
    value, a file that is missing, fails, or does not define the name, a name twice.
    """
    rewards: list[Reward] = []
    specs = list(specs)
    for number, spec in enumerate(specs):
        if spec.name in (other.name for other in specs[:number]):
            raise UserError(f"rewards: {spec.name!r} is there twice")
        if (spec.path is None) == (spec.name == MODEL) or (spec.path and (spec.file or spec.args or spec.seconds)):
            raise UserError(f"rewards: {spec.name!r}: {MODEL!r} has path, weight and on_error, no other reward a path")
        if spec.path is not None:
            continue
        definition = find("reward", spec.name, spec.file, "rewards")
        on_error = None if spec.on_error == "mask" else float(spec.on_error)
        function = bind(f"rewards: {spec.name!r}", definition.target, spec.args, unsafe)
        rewards.append(Reward(spec.name, spec.weight, function, definition.per, on_error, spec.seconds))
    return rewards


def needs_answer(spec: RewardConfig) -> bool:
    """Whether a built-in reward compares with a row's `answer`."""
    found = _builtin.get(("reward", spec.name))
    return spec.file is None and found is not None and found.needs_answer


def bind(where: str, target: Callable[..., Any], args: Mapping[str, Any], unsafe: bool) -> Callable[[Any], Any]:
    """`target` with its parameters, which its keyword-only arguments declare: an instance, or a function of a sample.
    Raises UserError that begins with `where`."""
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
        raise UserError("\n".join(_explain(where, list(fields), e) for e in error.errors())) from None
    values = {key: getattr(checked, key) for key in fields}
    return target(**values) if isinstance(target, type) else partial(target, **values)


def _explain(where: str, allowed: list[str], error: Any) -> str:
    key = ".".join(map(str, error["loc"]))
    where = f"{where}: args.{key}"
    if error["type"] == "extra_forbidden":
        return f"{where} is no parameter of it{nearest(key, allowed)}; allowed: {', '.join(allowed) or 'none'}"
    if error["type"] == "missing":
        return f"{where} is missing; its parameters: {', '.join(allowed)}"
    return f"{where}: {error['msg'][:1].lower() + error['msg'][1:]}, found {error['input']!r}"


def _load_file(path: Path, wanted: str, key: str) -> Definitions:
    """What a file defines; it is run once in a process."""
    global _registering
    if not path.is_file():
        raise UserError(f"{key}.file {path}: no such file ({wanted})")
    path = path.resolve()
    if path not in _files:
        _registering = {}
        try:
            module = ModuleType(f"_user_{len(_files)}_{path.stem}")
            module.__file__ = str(path)
            sys.modules[module.__name__] = module  # dataclasses and pickle look it up
            exec(compile(path.read_text(), str(path), "exec"), module.__dict__)
            _files[path] = _registering
        except Exception as error:
            raise UserError(f"{key}.file {path} fails: {last_line(error)}") from error
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
