"""Rejection sampling's second half: the right responses of `evaluate --samples N` become conversations for SFT.

    python examples/recipes/keep_correct.py EVALUATION OUT_DIR --most 2

Reads EVALUATION/responses.jsonl and writes OUT_DIR/rows.jsonl: of every prompt at most `--most` different right
responses that were not cut off, none of a prompt that was always right (nothing to learn) unless `--easy`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def keep(records: list[dict[str, Any]], most: int, easy: bool) -> list[dict[str, Any]]:
    """Conversations in the order of the prompts."""
    of_prompt: dict[int, list[dict[str, Any]]] = {}
    for record in records:
        of_prompt.setdefault(record["index"], []).append(record)
    rows = []
    for group in of_prompt.values():
        right = [r for r in group if r["reward"] > 0.5 and r["finish_reason"] == "stop"]
        if len(right) == len(group) and not easy:
            continue
        for response in list(dict.fromkeys(r["response"] for r in right))[:most]:
            rows.append({"messages": [*group[0]["messages"], {"role": "assistant", "content": response}]})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("evaluation", type=Path, metavar="EVALUATION")
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    parser.add_argument("--most", type=int, default=2, help="right responses a prompt (default: 2)")
    parser.add_argument("--easy", action="store_true", help="also of prompts that were always right")
    args = parser.parse_args()
    lines = (args.evaluation / "responses.jsonl").read_text().splitlines()
    rows = keep([json.loads(line) for line in lines], args.most, args.easy)
    if not rows:
        raise SystemExit(f"{args.evaluation}: none of {len(lines)} responses is right where another is wrong")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{args.out}/rows.jsonl: {len(rows):,} of {len(lines):,} responses kept")


if __name__ == "__main__":
    main()
