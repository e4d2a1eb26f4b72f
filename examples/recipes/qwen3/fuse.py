"""Make the rows of thinking-mode fusion (arXiv 2505.09388, section 4.3) from a reasoning model's right responses.

    python examples/recipes/qwen3/fuse.py SAMPLES.jsonl OUT_DIR --seed 0

SAMPLES.jsonl is what `sample --keep correct` left as sft.jsonl. OUT_DIR/rows.jsonl gets of each that reasons: the
response as it is, with /think or without a flag; the question with /no_think and the answer after an empty block; two
conversations of two turns, whose last flag says what their last turn does. Train it with data.train_on=last-assistant.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

Row = dict[str, Any]
EMPTY = "<think>\n\n</think>\n\n"  # as Qwen3's template writes it


def turn(row: Row, flag: str, thinks: bool, empty: str) -> list[dict[str, str]]:
    asked, said = row["messages"]
    content = said["content"] if thinks else empty + said["content"].rpartition("</think>")[2].lstrip()
    return [asked | {"content": asked["content"] + f" {flag}" * bool(flag)}, said | {"content": content}]


def conversation(rows: list[Row], rng: random.Random, empty: str) -> Row:
    """Thinking until a flag says otherwise; the last turn mostly has none, so that it has to look back for one."""
    messages, thinks = [], True
    for number, row in enumerate(rows, 1):
        flag = rng.choice(("/think", "/no_think", *[""] * (3 if number == len(rows) else 1)))
        thinks = thinks if not flag else flag == "/think"
        messages += turn(row, flag, thinks, empty)
    return {"messages": messages}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples", type=Path, metavar="SAMPLES.jsonl")
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    parser.add_argument("--seed", type=int, default=0, help="of flags and pairs (default: 0)")
    parser.add_argument("--empty", default=EMPTY, help="block before an answer without reasoning (default: Qwen3's)")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    samples = [json.loads(line) for line in args.samples.read_text().splitlines()]
    rows = [row for row in samples if row["messages"][-1]["content"].partition("</think>")[0].strip() != "<think>"]
    made = []
    for row in rows:
        made.append({"messages": turn(row, rng.choice(("", "/think")), True, args.empty)})
        made.append({"messages": turn(row, "/no_think", False, args.empty)})
        made += [conversation([rng.choice(rows), row], rng, args.empty) for _ in range(2)]
    rng.shuffle(made)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    print(
        f"{args.out}: {len(made):,} conversations from {len(rows):,} of {len(samples):,} responses, those that reason"
    )


if __name__ == "__main__":
    main()
