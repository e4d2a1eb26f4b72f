"""Rooms import in one direction: each only from those before it in the list of CONTRIBUTING.md."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "megatron_posttrain"
LONGEST_FUNCTION = 50  # lines, without the docstring


def order() -> list[str]:
    line = re.search(r"^Import order: (.*)$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert line is not None
    return re.findall(r"`(\w+)`", line[1])


def test_each_room_imports_only_earlier_ones() -> None:
    rooms = order()
    wrong = []
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).parts
        room = parts[0] if len(parts) > 1 else file.stem
        if room in ("__init__", "__main__"):
            continue
        assert room in rooms, f"{room} has no place in CONTRIBUTING.md's import order"
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("megatron_posttrain."):
                continue
            other = str(node.module).split(".")[1]
            if rooms.index(other) > rooms.index(room):
                wrong.append(f"{file.relative_to(ROOT)}:{node.lineno} imports {node.module}")
    assert not wrong


def test_tests_lie_as_rooms_do() -> None:
    """Beside those of the whole program; helpers, and stand-ins for Slurm and Transformer Engine, lie apart."""
    folders = {file.parent.name for file in (ROOT / "tests").rglob("test_*.py")} - {"tests", "slurm", "launch"}
    assert folders <= set(order())
    assert not [file for file in (ROOT / "tests").glob("*.py") if not re.match("test_|conftest|__init__", file.name)]


def test_no_two_classes_of_one_name() -> None:
    names = Counter(
        node.name
        for file in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert [name for name, count in names.items() if count > 1] == []


def test_functions_are_short() -> None:
    long = []
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            first = node.body[1] if ast.get_docstring(node) is not None and len(node.body) > 1 else node.body[0]
            lines = node.end_lineno - first.lineno + 1 if node.end_lineno else 0
            if lines > LONGEST_FUNCTION:
                long.append(f"{file.relative_to(ROOT)}:{node.lineno} {node.name}: {lines} lines")
    assert not long
