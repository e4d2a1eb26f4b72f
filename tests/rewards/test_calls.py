"""The reward `calls`: BFCL's rules, case by case."""

from __future__ import annotations

import json

import pytest

from megatron_posttrain.config.schema import RewardConfig
from megatron_posttrain.rewards import Sample, compute_rewards, load_rewards

FUNCTIONS = [{"name": "m.find", "parameters": {"properties": {"n": {"type": "integer"}, "x": {"type": "float"}}}}]
ONE = [{"m.find": {"n": [5], "place": ["New York, NY", "NYC"], "x": [2, ""]}}]
TWO = [{"f": {"a": [1]}}, {"f": {"a": [2]}}]
DEEP = [{"f": {"o": [{"k": [1, 2], "s": ["x", ""]}], "l": [["a", "B b"]], "b": [True]}}]


@pytest.mark.parametrize(
    ("expected", "said", "value"),
    [
        (ONE, "[m.find(n=5, place='new york ny')]", 1),  # case, spaces, punctuation; x may be left out
        (ONE, 'm.find(place="NYC", n=5, x=2.0)', 1),  # no list, another order, a float
        (ONE, '<think>m.find()</think><tool_call>{"name": "m.find", "arguments": {"n": 5, "place": "NYC"}}', 1),
        (ONE, "[m.find(n=5.0, place='NYC')]", 0),  # an integer is asked for
        (ONE, "[m.find(n=5)]", 0),  # place is required
        (ONE, "[m.find(n=5, place='NYC', y=1)]", 0),  # no such argument
        (ONE, "[m.find(5, 'NYC')]", 0),  # without names
        (ONE, "[find(n=5, place='NYC')]", 0),
        (ONE, "[m.find(n=5, place='NYC'), m.find(n=5, place='NYC')]", 0),
        (ONE, "The call is m.find(n=5, place='NYC')", 0),
        (TWO, "[f(a=2), f(a=1)]", 1),
        (TWO, "[f(a=1), f(a=1)]", 0),
        (TWO, "[f(a=True), f(a=2)]", 0),
        (DEEP, "[f(o={'k': 2}, l=['A', 'bb'], b=True)]", 1),
        (DEEP, "[f(o={'k': 2, 'z': 1}, l=['A', 'bb'], b=True)]", 0),
        (DEEP, "[f(o={'k': 3}, l=['A', 'bb'], b=True)]", 0),
        (DEEP, "[f(o={'k': 2}, l=['bb', 'A'], b=True)]", 0),
        (DEEP, "[f(o={'k': 2}, l=['A', 'bb'], b=1)]", 0),
        ([], "No function fits that.", 1),
        ([], "[]", 1),
        ([], "[f(a=1)]", 0),
        ([], "(" * 9999, 1),
    ],
)
def test_calls(expected: object, said: str, value: float) -> None:
    rewards = load_rewards([RewardConfig(name="calls")])
    [grade] = compute_rewards([Sample([], said, json.dumps(expected), {"functions": FUNCTIONS})], rewards)
    assert (grade.total, grade.failures) == (value, {})


def test_a_row_without_calls_is_told() -> None:
    [grade] = compute_rewards([Sample([], "f()", "f()")], load_rewards([RewardConfig(name="calls")]))
    assert "must be a JSON list of calls" in grade.failures["calls"]
