"""Make a toy recipe's rows from the quickstart's: what a course or a paper takes from people or larger models.

    python examples/recipes/make_rows.py ASSETS OUT_DIR --seed 0

ASSETS is what examples/quickstart/make_assets.py wrote. OUT_DIR gets
worked.jsonl      conversations whose answers are all worked out inside <think>
pairs.jsonl       preferences: the worked answer over one at once, or over one with a slip in it
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "quickstart"))

from make_assets import work_out, write_jsonl


def answers(row: dict[str, Any], rng: random.Random) -> tuple[str, str]:
    """The worked answer, and a worse one: not worked out, or with a wrong digit in its last sum."""
    worked = work_out(**row["metadata"])
    good = f"<think>{worked}</think>{row['answer']}"
    if rng.random() < 0.5:
        return good, f"<think></think>{int(row['answer']) + rng.choice((-10, -1, 1, 10))}"
    slip = re.sub(r"\d$", lambda last: str((int(last[0]) + rng.randint(1, 9)) % 10), worked)
    return good, f"<think>{slip}</think>{int(row['answer']) + rng.choice((-10, 10))}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("assets", type=Path, metavar="ASSETS")
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    parser.add_argument("--seed", type=int, default=0, help="of the slips (default: 0)")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    rows = [json.loads(line) for line in (args.assets / "rl.jsonl").read_text().splitlines()]
    conversations, pairs = [], []
    for row in rows:
        good, bad = answers(row, rng)
        conversations.append({"messages": [*row["messages"], {"role": "assistant", "content": good}]})
        pairs.append({"prompt": row["messages"][0]["content"], "chosen": good, "rejected": bad})
    args.out.mkdir(parents=True, exist_ok=True)
    write_jsonl(args.out / "worked.jsonl", conversations)
    write_jsonl(args.out / "pairs.jsonl", pairs)
    print(f"{args.out}: {len(conversations):,} conversations, {len(pairs):,} pairs")


if __name__ == "__main__":
    main()
