"""What answers a model's turns: the protocol, and environments by name, built in or from a user's Python file."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from pydantic import ValidationError, validate_call
from transformers.utils import get_json_schema

from megatron_posttrain.config.schema import EnvironmentConfig
from megatron_posttrain.data.dataset import Prompt
from megatron_posttrain.data.messages import Message
from megatron_posttrain.errors import UserError, nearest
from megatron_posttrain.rewards.registry import bind, define, find, last_line

ERROR = "error: "  # begins what a tool that failed tells the model
LONGEST_RESULT = 4000  # characters of a tool's result
Target = TypeVar("Target", bound=type)


@dataclass(frozen=True)
class Call:
    """A tool call of the model's."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    error: str = ""  # why it could not be read


@dataclass(frozen=True)
class Turn:
    """What the model said: `text` as generated, without the tokens that end it; `final` what follows its reasoning."""

    text: str
    final: str
    calls: tuple[Call, ...] = ()


@dataclass(frozen=True)
class Done:
    """The conversation is over; `reward` is what the reward `environment` gives."""

    reward: float = 0.0


class Environment(Protocol):
    """`start` and `reply` are called in threads, for many conversations at once.

    Attributes:
        tools: JSON schemas that the chat template writes into the prompt; empty where turns are plain text.
    """

    tools: list[dict[str, Any]]

    def start(self, prompt: Prompt) -> Any:
        """The state of a conversation, which `reply` may change."""

    def reply(self, state: Any, turn: Turn) -> list[Message] | Done:
        """What is said to the model after its turn."""


def environment(name: str) -> Callable[[Target], Target]:
    """Makes a class an environment that the configuration can name. Keyword-only parameters of its `__init__` are keys
    of `environment.args`, checked by their types."""
    return define("environment", name)


class ToolEnvironment:
    """Answers a turn's calls with what functions return; a turn without calls ends the conversation.

    Args:
        functions: their parameters have types, their docstrings a line a parameter under `Args:`; they return text.
    """

    def __init__(self, *functions: Callable[..., str]) -> None:
        self.tools: list[dict[str, Any]] = [get_json_schema(function) for function in functions]
        self._functions = {function.__name__: validate_call(function) for function in functions}

    def start(self, prompt: Prompt) -> Any:
        return prompt

    def reply(self, state: Any, turn: Turn) -> list[Message] | Done:
        return tool_messages(turn.calls, [self._result(call) for call in turn.calls]) if turn.calls else Done()

    def _result(self, call: Call) -> str:
        if call.error:
            return ERROR + call.error
        if call.name not in self._functions:
            near = nearest(call.name, self._functions)
            return f"{ERROR}no tool {call.name!r}{near}; there are: {', '.join(self._functions)}"
        try:
            result = str(self._functions[call.name](**call.arguments))
        except ValidationError as error:
            return ERROR + "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        except Exception as error:
            return f"{ERROR}{type(error).__name__}: {error}"
        more = len(result) - LONGEST_RESULT
        return result if more <= 0 else f"{result[:LONGEST_RESULT]} ... ({more:,} characters left out)"


def tool_messages(calls: Sequence[Call], results: Sequence[str]) -> list[Message]:
    return [{"role": "tool", "name": call.name, "content": result} for call, result in zip(calls, results, strict=True)]


def load_environment(spec: EnvironmentConfig, *, unsafe: bool = False) -> Environment:
    """Raises UserError for an unknown name or argument, and a file that is missing, fails, or has no such class."""
    target = find("environment", spec.name, spec.file, "environment").target
    where = f"environment: {spec.name!r}"
    if absent := [method for method in ("start", "reply") if not callable(getattr(target, method, None))]:
        raise UserError(f"{where} has no method {' and no '.join(absent)}; an environment has start and reply")
    try:
        made: Environment = bind(where, target, spec.args, unsafe)  # type: ignore[assignment]
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{where} cannot be made: {last_line(error)}") from error
    made.tools = getattr(made, "tools", [])
    return made
