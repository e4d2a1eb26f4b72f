"""Messages as people write them, in the one form that chat templates read."""

import json
import math
from typing import Any

from megatron_posttrain.errors import nearest

Message = dict[str, Any]

CALL = "function_call"  # a turn that is a call, or several, as JSON text
ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant",
    "bard": "assistant", "model": "assistant", "assistant": "assistant", "system": "system", "developer": "developer",
    "tool": "tool", "ipython": "ipython", "observation": "tool", "function_response": "tool", "tool_response": "tool",
    "function": "tool", "function_call": CALL, "tool_call": CALL,
}  # fmt: skip

# Per turn: how much an assistant's text counts in the loss, in the names that public data uses; of `SWITCHES` whether.
WEIGHTS = ("weight", "loss_weight", "loss_scale")
SWITCHES = ("train", "loss", "training")
TEXT_PARTS = ("text", "output_text", "input_text")
REASONING_PARTS = ("reasoning", "thinking")
PART_TYPES = (*TEXT_PARTS, *REASONING_PARTS, "tool_call")


class BadRow(Exception):
    """What is wrong with a row; who reads the file adds where."""


class LeftOut(Exception):
    """Why a row that is right as it is has nothing to train on; such rows are counted, and left out."""


def read_messages(value: Any, at: str) -> list[Message]:
    """`[{role, content}...]` or `[{from, value}...]`, checked and in one form.

    Content becomes text, tool arguments objects, null keys vanish, and a turn has a `weight` where that is not 1.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):  # CSV stores them as JSON text
        value = decoded(value, at)
    if isinstance(value, dict) and ({"role", "content"} <= set(value) or {"from", "value"} <= set(value)):
        value = [value]
    if not isinstance(value, list):
        raise BadRow(f"{at} must be a list, found {kind(value)}")
    return [read_message(message, f"{at}[{number}]") for number, message in enumerate(value)]


def read_message(message: Any, at: str) -> Message:
    if not isinstance(message, dict):
        raise BadRow(f"{at} must be {{role, content}}, found {kind(message)}")
    message = {name: value for name, value in message.items() if value is not None}
    if "from" in message and "role" not in message:
        message = _from_sharegpt(message, at)
    weight = _weight(message, at)
    calls = message.pop("tool_calls", None)
    if isinstance(calls, str):
        calls = decoded(calls, f"{at}.tool_calls") if calls.strip() else None
    if "function_call" in message:  # OpenAI's older form
        calls = [*(calls or []), message.pop("function_call")]
    if isinstance(message.get("content"), list):
        message.update(_from_parts(message["content"], f"{at}.content"))
    calls = [*(calls or []), *message.pop("tool_calls", [])]
    if calls:
        message.setdefault("content", "")
        message["tool_calls"] = [_tool_call(call, f"{at}.tool_calls[{n}]") for n, call in enumerate(calls)]
    for name in ("role", "content"):
        if not isinstance(message.get(name), str):
            raise BadRow(f"{at}.{name} must be a string, found {kind(message.get(name))}")
    message["role"] = role = _role(message["role"], at)
    if role == CALL:
        message |= _called(message["content"], f"{at}.content")
    if weight not in (0, 1) and message["role"] != "assistant":
        raise BadRow(f"{at}.weight is {weight} in a turn of the {role}; allowed there: 0 or 1")
    return message | ({} if weight == 1 else {"weight": weight})


def _role(name: str, at: str) -> str:
    """The name that templates have for a role; a slip of the pen is refused, a role of a template's own is kept."""
    if name == "observation":  # GLM's templates read it
        return name
    role = ROLES.get(name.lower())
    if role is None and (close := nearest(name.lower(), ROLES)):
        raise BadRow(f"{at}.role is {name!r}{close}")
    return role or name


def _from_sharegpt(turn: Message, at: str) -> Message:
    role = ROLES.get(str(turn["from"]))
    if role is None:
        allowed = ", ".join(ROLES)
        raise BadRow(f"{at}.from is {turn['from']!r}; allowed: {allowed}{nearest(str(turn['from']), ROLES)}")
    value = turn.get("value", turn.get("content"))
    if not isinstance(value, str):
        raise BadRow(f"{at} must be {{from, value}} of strings, found {kind(turn)}")
    kept = {name: x for name, x in turn.items() if name not in ("from", "value", "content")}
    return {**kept, "role": role, "content": value}


def _called(text: str, at: str) -> Message:
    """The assistant's turn of a call, or a list of calls, in JSON text."""
    calls = decoded(text, at)
    calls = calls if isinstance(calls, list) else [calls]
    calls = [_tool_call(call, f"{at}[{number}]") for number, call in enumerate(calls)]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def _from_parts(parts: list[Any], at: str) -> Message:
    """Text, reasoning and tool calls of a list of parts."""
    text: list[str] = []
    reasoning: list[str] = []
    calls: list[Any] = []
    for number, part in enumerate(parts):
        here = f"{at}[{number}]"
        if not isinstance(part, dict) or part.get("type") not in PART_TYPES:
            found = part.get("type") if isinstance(part, dict) else part
            raise BadRow(f"{here} must be a part of type {', '.join(PART_TYPES)}, found {kind(found)}")
        type_ = part["type"]
        value = next((part[name] for name in (type_, "text", "value") if part.get(name) is not None), None)
        if type_ == "tool_call":
            calls.append(decoded(value, here) if isinstance(value, str) else value)
            continue
        if not isinstance(value, str):
            raise BadRow(f"{here}: text of a part must be a string, found {kind(value)}")
        (reasoning if type_ in REASONING_PARTS else text).append(value)
    message: Message = {"content": "".join(text)}
    return message | ({"reasoning_content": "".join(reasoning)} if reasoning else {}) | (
        {"tool_calls": calls} if calls else {}
    )  # fmt: skip


def _weight(message: Message, at: str) -> float:
    """What the loss of a turn's tokens is multiplied by; takes the keys that say so out of the message."""
    weight: float = 1
    for name in (*WEIGHTS, *SWITCHES):
        if name in message:
            value = message.pop(name)
            if name in SWITCHES and value not in (0, 1):  # False and True too
                raise BadRow(f"{at}.{name} must be 0 or 1 (false or true), found {kind(value)}")
            if not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise BadRow(f"{at}.{name} must be a number of at least 0, found {kind(value)}")
            weight *= value
    return weight


def read_tools(value: Any) -> list[Any]:
    """Tool schemas given as a list or as its JSON text; bare functions are wrapped as templates expect."""
    tools = decoded(value, "tools") if isinstance(value, str) and value.strip() else value or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow(f"tools must be a list of objects, or that as JSON text, found {kind(value)}")
    wrapped = [{"type": "function", "function": t} if "function" not in t and "name" in t else t for t in tools]
    return without_nulls(wrapped)


def normal_calls(messages: list[Message]) -> list[Message]:
    """The messages with every tool call's arguments as an object."""
    return [
        {**m, "tool_calls": [_tool_call(c, f"messages[{i}].tool_calls[{n}]") for n, c in enumerate(m["tool_calls"])]}
        if m.get("tool_calls")
        else m
        for i, m in enumerate(messages)
    ]


def _tool_call(call: Any, at: str) -> Any:
    """A call whose arguments are an object; public data has them as JSON text as well."""
    if not isinstance(call, dict):
        raise BadRow(f"{at} must be an object with a name and arguments, found {kind(call)}")
    call = without_nulls(call)
    function = call["function"] if isinstance(call.get("function"), dict) else call
    if not isinstance(function.get("name"), str):
        raise BadRow(f"{at}.name must be a string, found {kind(function.get('name'))}")
    name = "arguments" if "arguments" in function else "parameters"  # Llama's name for them
    arguments = function.get(name, {})
    function = {**{key: value for key, value in function.items() if key != name}, "arguments": arguments}
    if isinstance(arguments, str):
        arguments = decoded(arguments, f"{at}.arguments") if arguments.strip() else {}
        if isinstance(arguments, str):
            arguments = decoded(arguments, f"{at}.arguments")
        function = {**function, "arguments": arguments}
    if not isinstance(arguments, dict):
        raise BadRow(f"{at}.arguments must be an object, or that as JSON text, found {kind(arguments)}")
    if others := [key for key, value in function.items() if key != "arguments" and isinstance(value, dict)]:
        raise BadRow(f"{at}.{others[0]} would not be read; a call's arguments are under `arguments`")
    return {**call, "function": function} if "function" in call else function


def without_nulls(value: Any) -> Any:
    """The value without null keys: a table's struct has the keys of all of its rows."""
    if isinstance(value, dict):
        return {key: without_nulls(x) for key, x in value.items() if x is not None}
    return [without_nulls(x) for x in value] if isinstance(value, list) else value


def decoded(text: Any, at: str) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError) as error:
        raise BadRow(f"{at}: malformed JSON: {error}; found {kind(text)}") from None


def kind(value: Any) -> str:
    """A value as an error message shows it."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return "nothing" if value is None else text if len(text) <= 80 else text[:77] + "..."


def read_object(record: dict[str, Any], key: str) -> dict[str, Any]:
    """A column that holds an object, or its JSON text, as tables store it; empty where there is none."""
    value = record.get(key)
    if value is None:
        return {}
    if isinstance(value, str) and value.lstrip().startswith("{"):
        value = decoded(value, key)
    if not isinstance(value, dict):
        raise BadRow(f"{key} must be an object, found {kind(value)}")
    return dict(value)
