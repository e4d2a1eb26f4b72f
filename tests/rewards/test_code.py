"""Code against tests: HumanEval's and MBPP's own solutions pass, broken ones fail; see test_sandbox.py for cheats."""

from __future__ import annotations

import ast
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_posttrain import sandbox
from megatron_posttrain.config.schema import RewardConfig
from megatron_posttrain.rewards import Sample, code, compute_rewards, load_rewards

SETS = Path(__file__).resolve().parents[3] / "shared" / "data" / "datasets"
isolated = pytest.mark.skipif(sandbox.why_unavailable() is not None, reason="programs cannot be isolated here")
shared = pytest.mark.skipif(not SETS.is_dir(), reason="no ../shared/data")


def read(name: str) -> list[dict[str, Any]]:
    with gzip.open(SETS / name, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def grade(rows: list[tuple[str, dict[str, Any]]], **args: Any) -> list[float | str]:
    samples = [Sample([], f"Here:\n```python\n{code}\n```\nDone.", None, metadata) for code, metadata in rows]
    grades = compute_rewards(samples, load_rewards([RewardConfig(name="code", args=args)]), threads=2)
    return [g.failures.get("code") or g.rewards["code"] for g in grades]


class _Broken(ast.NodeTransformer):
    """Every function returns what no test expects."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        node.body = [ast.parse("return 'wrong', 12345").body[0]]
        return node


def broken(code: str) -> str:
    return ast.unparse(_Broken().visit(ast.parse(code)))


def canonical(every: int) -> list[tuple[str, dict[str, Any]]]:
    """Solutions with their tests, one in `every`; HumanEval's with the whole function, as chat models answer."""
    rows = [(row["prompt"] + row["canonical_solution"], row) for row in read("human_eval/HumanEval.jsonl.gz")]
    return (rows + [(row["code"], row) for row in read("mbpp/mbpp.jsonl.gz")])[::every]


@isolated
@shared
def test_canonical_solutions_pass_and_broken_ones_fail() -> None:
    rows = canonical(every=40)
    assert len(rows) > 25
    assert grade(rows, seconds=60) == [1.0] * len(rows)
    assert grade([(broken(code), row) for code, row in rows], seconds=60) == [0.0] * len(rows)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@isolated
@shared
def test_all_canonical_solutions() -> None:
    rows = canonical(every=1)
    values = grade(rows, seconds=120)
    assert [row["task_id"] for (_, row), value in zip(rows, values, strict=True) if value != 1.0] == []
    values = grade([(broken(code), row) for code, row in rows], seconds=120)
    assert [row["task_id"] for (_, row), value in zip(rows, values, strict=True) if value != 0.0] == []


@isolated
def test_what_travels_between_program_and_tests() -> None:
    program = """
from collections import Counter, OrderedDict, namedtuple
from decimal import Decimal
Point = namedtuple('Point', 'x y')
class Stack:
    def __init__(self): self.items = []
    def push(self, x): self.items.append(x)
    def __len__(self): return len(self.items)
def same(x): return x
def reverse(items): items.reverse()
def stack(): return Stack()
def numbers(): yield from (1, 2)
def fails(x): raise ValueError('bad ' + x)
def point(): return Point(1, 2)
"""
    tests = [
        "value = [1, 2.5, 'ü\\ud800', None, True, (1, (2,)), {3}, frozenset({4}),"
        " {(1, 2): b'x'}, 10**5000, 1j, range(3)]",
        "assert same(value) == value and [type(a) for a in same(value)] == [type(b) for b in value]",
        "assert same(float('inf')) == float('inf') and same(float('nan')) != same(float('nan'))",
        "items = [1, 2, 3]\nreverse(items)\nassert items == [3, 2, 1]",
        "s = stack()\ns.push(5)\nassert len(s) == 1 and list(s.items) == [5] and s != stack()",
        "assert sorted(numbers()) == [1, 2] and point() == (1, 2) and Counter('aab') == {'a': 2, 'b': 1}",
        "try:\n    fails('x')\n    assert False\nexcept ValueError as error:\n    assert str(error) == 'bad x'",
        "assert math.isclose(same(0.1) + same(0.2), 0.3) and same(int) is int",
    ]
    assert grade([(program, {"tests": tests})], partial=True) == [1.0]
    assert grade([(program, {"tests": [*tests, "assert same(1) == 2", "nowhere()"]})], partial=True) == [0.8]
    assert "the row's tests are no Python" in str(grade([(program, {"tests": ["same("]})])[0])


def test_the_last_block_counts() -> None:
    text = "```python\nfirst\n```\nand\n```py\nsecond\n```\nprints\n```text\n5\n```\n```python\ncut"
    assert code.program_of(text) == "second\n"
    assert code.program_of("x = 1") == "x = 1"


def test_where_tests_are_found() -> None:
    def found(answer: str | None = None, **metadata: Any) -> Any:
        return code.tests_of(Sample([], "", answer, metadata))

    assert found("assert f(1) == 2").asserts == ("assert f(1) == 2",)
    assert found('{"test_list": ["assert f()"], "test_setup_code": "x = 1"}').setup == "x = 1"
    assert found('[{"input": "1", "output": 2}]').pairs == (("1", "2"),)
    assert found(inputs=["1", ["2", "3"]], outputs=["4", "5"]).pairs == (("1", "4"), ("2\n3", "5"))
    assert found(tests=["assert sum(1, 2) == 3"]).entry_point == "sum"
    assert found(tests=["assert sum(f(1)) == 3"]).entry_point == ""
