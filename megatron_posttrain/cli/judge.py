"""`judge FILE...`: models' answers compared by a judge, in both orders, or each graded by itself."""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from pydantic_core import to_json

from megatron_posttrain.cli.row_options import json_object
from megatron_posttrain.errors import UserError
from megatron_posttrain.output import check_output, columns, write_whole

FILES = ("judge.json", "verdicts.jsonl", "cache.sqlite")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("files", nargs="+", metavar="NAME=FILE", help="two or more: responses.jsonl of evaluate or sample, or rows of "
        "prompt and response, or messages; NAME may be left out")  # fmt: skip
    add("--grade", action="store_true", help="every turn's answer graded by itself, as MT-Bench does, of one file or "
        "more; a table by turn and by the rows' metadata.category (default: compared)")  # fmt: skip
    add("--references", metavar="FILE", help="MT-Bench's rows of question_id and choices.0.turns, right answers for "
        "--grade, by the rows' metadata.question_id (default: none)")  # fmt: skip
    add("--address", required=True, metavar="URL", help="of an OpenAI-compatible API, as http://localhost:8000/v1")
    add("--judge", required=True, metavar="NAME", help="the judge's name there")
    add("--judge-args", type=json_object, default={}, metavar="JSON", help="rubric, prompt, temperature, max_tokens, "
        "seconds, retries, concurrency, budget, key, as of the reward `judge` (default: its own)")  # fmt: skip
    add("--output", default="runs/judge", metavar="DIR", help="judge.json, verdicts.jsonl, and the judge's replies, so "
        "that none is asked for twice (default: runs/judge)")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Exit status: 1 where verdicts are missing; run again, those are asked for."""
    from megatron_posttrain.evaluation import judge as room

    output = Path(args.output)
    check_output(output, "--output", FILES)
    named = [text.rpartition("=") for text in args.files]
    names = [name or file for name, _, file in named]
    if len(set(names)) < max(2 - args.grade, len(names)):
        raise UserError(f"{', '.join(args.files)}: two or more files of different names are compared")
    if args.references and not args.grade:
        raise UserError("--references would be ignored without --grade")
    models = {name: room.read_answers(file, args.grade) for name, (_, _, file) in zip(names, named, strict=True)}
    references = room.read_references(args.references) if args.references else {}
    judge = _judge(args, output)
    verdicts: Any
    if args.grade:
        verdicts, missing, canary = room.grade_answers(models, judge, references)
    else:
        verdicts, missing, canary = room.compare_answers(models, judge)
    output.mkdir(parents=True, exist_ok=True)
    (output / "verdicts.jsonl").write_bytes(b"".join(to_json(verdict) + b"\n" for verdict in verdicts))
    if verdicts:
        about = verdicts, names, canary
        found = room.grade_report(*about, judge) if args.grade else room.report(*about)
        write_whole(output / "judge.json", json.dumps(found, indent=2, ensure_ascii=False))
        print((grade_table if args.grade else table)(found) + f"\n\nwritten to {output}/judge.json and verdicts.jsonl")
    if missing:
        why, count = Counter(missing).most_common(1)[0]
        print(
            f"error: {len(missing):,} of {len(missing) + len(verdicts):,} verdicts are missing, {count:,} since {why}; "
            "run the same command again: the replies that came are kept", file=sys.stderr,
        )  # fmt: skip
    return 1 if missing else 0


def _judge(args: argparse.Namespace, output: Path) -> Any:
    from megatron_posttrain.config.schema import RewardConfig
    from megatron_posttrain.rewards import load_rewards

    mode = "grade" if args.grade else "compare"
    fixed = {"address": args.address, "model": args.judge, "mode": mode, "cache": str(output / "cache.sqlite")}
    if told := fixed.keys() & args.judge_args.keys():
        options = "--address, --judge, --grade, --output"
        raise UserError(f"--judge-args: {', '.join(sorted(told))} cannot be set there; use {options}")
    return load_rewards([RewardConfig(name="judge", args=fixed | args.judge_args)])[0]


def _fooled(judge: dict[str, Any]) -> list[str]:
    told = f"WARNING: it can be fooled: an answer that says nothing got {judge['canary']:.2f} of 1"
    return [told] if judge["canary"] > 0.5 else []


def grade_table(found: dict[str, Any]) -> str:
    judge, models = found["judge"], found["models"]
    turns = sorted({turn for row in models for turn in row["turns"]}, key=int)
    rows = [["model", "category", "answers", "grade", "95% interval", *(f"turn {turn}" for turn in turns)]]
    for row in models:
        each = (f"{row['turns'][turn]:.2f}" if turn in row["turns"] else "-" for turn in turns)
        interval = f"{row['low']:.2f} to {row['high']:.2f}"
        rows.append([row["model"], row["category"], row["answers"], f"{row['grade']:.2f}", interval, *each])
    said = f"judge: {judge['grades']:,} grades from {judge['low']:g} to {judge['high']:g}"
    return "\n".join([said, *_fooled(judge), "", columns(rows)])


def table(found: dict[str, Any]) -> str:
    judge = found["judge"]
    said = (
        f"judge: {judge['verdicts']:,} verdicts, {judge['contradictory']:.1%} contradict themselves in the other order,"
        f" {judge['shown_first']:.1%} for the answer shown first, {judge['longer']:.1%} for the longer one"
    )  # fmt: skip
    pairs = [["model", "against", "win rate", "95% interval", "length-controlled", "wins", "ties", "losses"]]
    for p in found["pairs"]:
        rates = f"{p['win_rate']:.3f}", f"{p['low']:.3f} to {p['high']:.3f}", f"{p['length_controlled']:.3f}"
        pairs.append([p["first"], p["second"], *rates, p["wins"], p["ties"], p["losses"]])
    models = [["model", "rating", "95% interval", "length-controlled"]]
    for m in found["models"]:
        ratings = f"{m['rating']:.0f}", f"{m['low']:.0f} to {m['high']:.0f}", f"{m['length_controlled']:.0f}"
        models.append([m["model"], *ratings])
    return "\n".join([said, *_fooled(judge), "", columns(pairs), "", columns(models)])
