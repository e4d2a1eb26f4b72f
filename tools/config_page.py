"""Writes docs/config.md from the schema: every key of every training command, with its default and values.

python tools/config_page.py            # writes it; tests/test_docs.py holds that it is current
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megatron_posttrain.config.algorithms import ALGORITHMS, Algorithm  # noqa: E402
from megatron_posttrain.config.load import keys  # noqa: E402
from megatron_posttrain.config.schema import Config  # noqa: E402

PAGE = ROOT / "docs" / "config.md"
INTRODUCTION = """\
# Configuration

Made by `python tools/config_page.py` from the schema; do not edit. `COMMAND --help` prints the same keys.

A config is a YAML file, a tree of the keys below; `key.sub=value` on the command line takes precedence over it, and
`defaults: [base.yaml]` names files that are read before it. A key that is not here is refused, and so is one that the
command would ignore. `COMMAND --config FILE --print-config` prints what a run would see.
"""


def page() -> str:
    """The page's text: what all commands share, then what each adds or refuses."""
    shared = list(keys(Config))
    parts = [INTRODUCTION, "## Every command\n", *_table(shared)]
    common = {key for key, *_ in shared}
    for name, algorithm in ALGORITHMS.items():
        parts += [f"\n## `{name}`: {algorithm.help}\n", *_own(algorithm, common)]
    return "\n".join(parts) + "\n"


def _own(algorithm: Algorithm, common: set[str]) -> Iterator[str]:
    own = [row for row in keys(algorithm.config) if row[0] not in common]
    yield from _table(own) if own else ["No keys of its own."]
    if algorithm.config.ignored:
        yield "\nRefused, because it would have no effect:\n"
        yield from (f"* `{key}`: {why}" for key, why in algorithm.config.ignored.items())


def _table(rows: Iterable[tuple[str, str, str]]) -> Iterator[str]:
    yield "| key | default | values and meaning |\n|---|---|---|"
    for key, default, text in rows:
        shown = "required" if default == "(required)" else f"`{default}`"
        text = text.replace("|", "\\|")
        yield f"| `{key}` | {shown} | {text} |"


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"{PAGE.relative_to(ROOT)} written")
