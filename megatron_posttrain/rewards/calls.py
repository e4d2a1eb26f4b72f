"""Function calls against the values that their arguments may have, as BFCL's categories of single turns ask."""

import ast
import json
import re
from collections.abc import Mapping
from typing import Any

from megatron_posttrain.rewards.registry import GradingError, Sample, reward

HERMES = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_FENCE = re.compile(r"```(?:\w+)?\s*\n(.*?)```", re.DOTALL)
Call = tuple[str, dict[str, Any]]


@reward("calls", needs_answer=True)
def calls(sample: Sample) -> float:
    """1.0 when the answer's calls are the expected ones, in any order; where none is expected, when it has none.

    The answer: Python calls with named arguments, `[f(a=1), g(b="x")]`, or `<tool_call>` with JSON. The row's `answer`:
    JSON, `[{"f": {"a": [1, 2], "b": ["x", ""]}}]`, accepted values by argument, "" where it may be left out. Texts are
    compared without case, spaces and ,./-_*^ ; an int passes for a float. `metadata.functions`: the functions'
    descriptions, whose `integer` arguments take no float.
    """
    try:
        expected = [next(iter(call.items())) for call in json.loads(sample.answer or "")]
    except (ValueError, AttributeError, StopIteration) as error:
        raise GradingError(f"the row's answer must be a JSON list of calls, found {sample.answer!r:.80}") from error
    said, functions = _read(sample.final or ""), sample.metadata.get("functions") or []
    if said is None or len(said) != len(expected):
        return float(not said and not expected)
    types = {f["name"]: {k: p.get("type") for k, p in f["parameters"]["properties"].items()} for f in functions}
    for name, allowed in expected:
        found = next((call for call in said if call[0] == name and _fits(call[1], allowed, types.get(name, {}))), None)
        if found is None:
            return 0.0
        said.remove(found)
    return 1.0


def _read(text: str) -> list[Call] | None:
    """The calls of an answer; None where it is not written as calls."""
    try:
        if found := HERMES.findall(text):
            values = [json.loads(one) for one in found]
            return [(value["name"], dict(value.get("arguments", {}))) for value in values]
        fenced = _FENCE.findall(text)
        node = ast.parse((fenced[-1] if fenced else text).strip(), mode="eval").body
        nodes = node.elts if isinstance(node, ast.List) else [node]
        if not all(isinstance(one, ast.Call) and not one.args for one in nodes):
            return None
        named = [(ast.unparse(one.func), one.keywords) for one in nodes if isinstance(one, ast.Call)]
        return [(name, {str(k.arg): ast.literal_eval(k.value) for k in keywords}) for name, keywords in named]
    except (SyntaxError, ValueError, TypeError, KeyError, AttributeError, RecursionError, MemoryError):
        return None


def _fits(given: Mapping[str, Any], allowed: Mapping[str, Any], types: Mapping[str, Any]) -> bool:
    if given.keys() - allowed.keys() or any(types.get(k) == "integer" and type(v) is float for k, v in given.items()):
        return False
    return all(any(_same(given.get(key, ""), one) for one in values) for key, values in allowed.items())


def _same(value: Any, one: Any) -> bool:
    if isinstance(one, dict):
        return isinstance(value, dict) and _fits(value, one, {})
    if isinstance(one, list):
        return isinstance(value, list | tuple) and len(value) == len(one) and all(map(_same, value, one))
    if isinstance(one, str) and isinstance(value, str):
        return _plain(value) == _plain(one)
    return isinstance(value, bool) == isinstance(one, bool) and bool(value == one)


def _plain(text: str) -> str:
    return re.sub(r"[ ,./\-_*^]", "", text).lower().replace("'", '"')
