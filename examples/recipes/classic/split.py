"""Part public rows into those that are trained on and those that are kept for validation.

    python examples/recipes/classic/split.py FILE OUT_DIR --held 200 --seed 0

FILE is in any form that the command `data` reads. OUT_DIR gets train.jsonl and held.jsonl: `messages`, with their
answer, or `prompt`, `chosen` and `rejected`. Rows that share their first question are on one side.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from megatron_posttrain.data.rows import Row, read_rows


def written(row: Row) -> dict[str, Any]:
    if row.chosen:
        return {"prompt": row.messages, "chosen": row.chosen, "rejected": row.rejected}
    return {"messages": row.messages}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    parser.add_argument("--held", type=int, default=200, metavar="N", help="rows for validation (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice (default: 0)")
    args = parser.parse_args()
    rows = read_rows(args.file, use="any")
    questions: dict[str, list[Row]] = {}
    for row in rows:
        questions.setdefault(json.dumps(row.messages[:1]), []).append(row)
    order = sorted(questions, key=lambda text: hashlib.sha256(f"{args.seed} {text}".encode()).digest())
    parts: dict[str, list[Row]] = {"held": [], "train": []}
    for question in order:
        parts["held" if len(parts["held"]) < args.held else "train"] += questions[question]
    if not parts["train"]:
        sys.exit(f"{args.file}: {len(rows)} rows, --held {args.held} leaves none to train on; allowed: fewer")
    args.out.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        (args.out / f"{name}.jsonl").write_text("".join(json.dumps(written(row)) + "\n" for row in part))
        print(f"{name}: {len(part)} rows of {args.file}")


if __name__ == "__main__":
    main()
