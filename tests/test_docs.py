"""What the documents say is what the package does: their command lines are parsed, their configs resolved."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_posttrain.cli.main import command_parser, commands
from megatron_posttrain.config.algorithms import ALGORITHMS
from megatron_posttrain.config.load import load_config
from tests.helpers.launch import EXAMPLES, ROOT

PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "launch/README.md", *(ROOT / "docs").glob("*.md")])
REQUIRED = ("model.path=x", "data.train=x", "output=x")


def command_lines(page: Path) -> Iterator[list[str]]:
    """The words after `megatron_posttrain` of every indented or fenced line, continued lines joined."""
    text = page.read_text().replace("\\\n", " ")
    for line in re.findall(r"^(?:    |\$ ).*(?:-m megatron_posttrain|node\.sh|megatron-posttrain) .+$", text, re.M):
        words = shlex.split(re.split("megatron_posttrain |node.sh |megatron-posttrain ", line)[-1], comments=True)
        while words and words[0] not in commands():  # options of the launcher
            words.pop(0)
        if words:
            yield words


def test_the_config_page_is_current() -> None:
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        from config_page import PAGE, page
    finally:
        sys.path.pop(0)
    assert PAGE.read_text() == page(), "run `python tools/config_page.py`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_command_lines_are_valid(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for name, *words in command_lines(page):
        args = command_parser(name).parse_args([word for word in words if word != "..."])
        if name in ALGORITHMS and args.config != "FILE":
            config = ALGORITHMS[name].config
            load_config(config, args.config, [*(REQUIRED if args.config is None else ()), *args.overrides])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_are_named_exist(page: Path) -> None:
    text = page.read_text()
    named = re.findall(
        r"\b((?:tools|tests|examples|benchmarks|launch|docs)/[\w/.-]*\w\.(?:py|sh|md|yaml|svg|json|txt))\b", text
    )
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    missing = [name for name in named if not (ROOT / name).exists() and "MACHINE" not in name]
    missing += [link for link in links if not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: str(file.relative_to(ROOT)))
def test_example_configs_resolve(file: Path) -> None:
    """Each names its command in a comment, or by its keys or name."""
    text = file.read_text()
    said = re.search(r"megatron_posttrain ([\w-]+) --config", text)
    name = said.group(1) if said else "grpo" if "rollout:" in text else "sft"
    load_config(ALGORITHMS[name].config, file, [])


def test_command_lines_are_found() -> None:
    assert {"sft", "grpo"} <= {words[0] for words in command_lines(ROOT / "README.md")}
