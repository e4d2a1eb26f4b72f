"""`judge FILE FILE...`: models' answers to the same prompts compared by a judge, in both orders."""

import argparse
import json
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_posttrain.cli.row_options import json_object
from megatron_posttrain.errors import UserError
from megatron_posttrain.output import check_output

FILES = ("judge.json", "verdicts.jsonl", "cache.sqlite")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("files", nargs="+", metavar="NAME=FILE", help="two or more: responses.jsonl of evaluate or sample, or rows of "
        "prompt and response; NAME may be left out")  # fmt: skip
    add("--address", required=True, metavar="URL", help="of an OpenAI-compatible API, as http://localhost:8000/v1")
    add("--judge", required=True, metavar="NAME", help="the judge's name there")
    add("--judge-args", type=json_object, default={}, metavar="JSON", help="rubric, prompt, temperature, max_tokens, "
        "seconds, retries, concurrency, budget, key, as of the reward `judge` (default: its own)")  # fmt: skip
    add("--output", default="runs/judge", metavar="DIR", help="judge.json, verdicts.jsonl, and the judge's replies, so "
        "that none is asked for twice (default: runs/judge)")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Exit status: 1 where verdicts are missing; run again, those are asked for."""
    from megatron_posttrain.config.schema import RewardConfig
    from megatron_posttrain.evaluation.judge import compare_answers, read_answers, report
    from megatron_posttrain.rewards import load_rewards

    output = Path(args.output)
    check_output(output, "--output", FILES)
    named = [text.rpartition("=") for text in args.files]
    names = [name or file for name, _, file in named]
    if len(set(names)) < max(2, len(names)):
        raise UserError(f"{', '.join(args.files)}: two or more files of different names are compared")
    models = {name: read_answers(file) for name, (_, _, file) in zip(names, named, strict=True)}
    fixed = {"address": args.address, "model": args.judge, "mode": "compare", "cache": str(output / "cache.sqlite")}
    if told := fixed.keys() & args.judge_args.keys():
        raise UserError(
            f"--judge-args: {', '.join(sorted(told))} cannot be set there; use --address, --judge, --output"
        )
    [judge] = load_rewards([RewardConfig(name="judge", args=fixed | args.judge_args)])
    verdicts, missing, canary = compare_answers(models, judge)
    output.mkdir(parents=True, exist_ok=True)
    with (output / "verdicts.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(verdict), ensure_ascii=False) + "\n" for verdict in verdicts)
    if verdicts:
        found = report(verdicts, names, canary)
        (output / "judge.json").write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        print(table(found) + f"\n\nwritten to {output}/judge.json and verdicts.jsonl")
    if missing:
        why, count = Counter(missing).most_common(1)[0]
        print(
            f"error: {len(missing):,} of {len(missing) + len(verdicts):,} verdicts are missing, {count:,} since {why}; "
            "run the same command again: the replies that came are kept", file=sys.stderr,
        )  # fmt: skip
    return 1 if missing else 0


def table(found: dict[str, Any]) -> str:
    judge = found["judge"]
    lines = [
        f"judge: {judge['verdicts']:,} verdicts, {judge['contradictory']:.1%} contradict themselves in the other order,"
        f" {judge['shown_first']:.1%} for the answer shown first, {judge['longer']:.1%} for the longer one"
    ]  # fmt: skip
    if judge["canary"] > 0.5:
        lines.append(f"WARNING: it can be fooled: an answer that says nothing got {judge['canary']:.2f} of 1")
    width = max(len("model"), *(len(row["model"]) for row in found["models"]))
    lines.append(
        f"\n{'model':{width}}  {'against':{width}}  win rate  95% interval   length-controlled  wins ties losses"
    )
    lines += [
        f"{p['first']:{width}}  {p['second']:{width}}  {p['win_rate']:8.3f}  {p['low']:.3f} to {p['high']:.3f}  "
        f"{p['length_controlled']:16.3f}  {p['wins']:4} {p['ties']:4} {p['losses']:6}" for p in found["pairs"]
    ]  # fmt: skip
    lines.append(f"\n{'model':{width}}  rating  95% interval  length-controlled")
    lines += [
        f"{m['model']:{width}}  {m['rating']:6.0f}  {m['low']:4.0f} to {m['high']:4.0f}  {m['length_controlled']:17.0f}"
        for m in found["models"]
    ]
    return "\n".join(lines)
