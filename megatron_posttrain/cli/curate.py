"""`curate FILE...`: rows worth training on, without a model; every dropped row aside with its reason."""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from megatron_posttrain.cli.row_options import add_columns
from megatron_posttrain.errors import UserError, nearest
from megatron_posttrain.output import check_output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE", help="JSON lines or array, CSV (.gz, .zst too), Parquet, a dataset")
    add("--output", default="runs/curated", metavar="DIR", help="rows.jsonl, dropped.jsonl, curation.json go there "
        "(default: runs/curated)")  # fmt: skip
    add_columns(parser)
    add("--text", choices=("row", "prompt"), default="row", help="what duplicates and lengths are told by: all of a "
        "row, or the prompt alone (default: row)")  # fmt: skip
    add("--near", type=_share, default=0.8, metavar="J", help="Jaccard similarity of 5-word shingles from which a row "
        "repeats an earlier one; 0: only equal texts do (default: 0.8)")  # fmt: skip
    add("--against", nargs="+", default=[], metavar="FILE", help="evaluation files: rows that share their prompts go")
    add_columns(parser, "--against-columns", "of these files, as data.columns")
    add("--ngram", type=_count, metavar="N", help="words of a shared n-gram: 8, 10 or 13 in print (default: 8)")
    add("--overlap", type=_share, metavar="X", help="share of an evaluation prompt's words that lie in "
        "shared n-grams; 0: one n-gram is enough (default: 0.5, with 8 words the rule of Tulu 3)")  # fmt: skip
    add("--min-words", type=_count, metavar="N", help="of a text (default: 1)")
    add("--max-words", type=_count, metavar="N", help="of a text (default: no limit)")
    add("--repetition", type=_share, metavar="X", help="largest share of a text's 5-word shingles that were there "
        "before in it (default: no limit)")  # fmt: skip
    add("--language", metavar="CODE", help="ISO 639-1, as en (default: any)")
    add("--language-share", type=_share, metavar="X", help="of words in it (default: 0.8)")
    add("--require", type=_pattern, metavar="REGEX", help="that the last answer must match somewhere")
    add("--refuse", type=_pattern, metavar="REGEX", help="that the last answer must not match")


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 1")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text, re.DOTALL)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from None


def run(args: argparse.Namespace) -> int:
    from megatron_posttrain.curation import Rules, curate
    from megatron_posttrain.curation.contamination import Contamination
    from megatron_posttrain.rewards.language import LANGUAGES

    output = Path(args.output)
    check_output(output, "--output", ("rows.jsonl", "dropped.jsonl", "curation.json"))
    for file in (*args.files, *args.against):
        if Path(file).resolve() in ((output / name).resolve() for name in ("rows.jsonl", "dropped.jsonl")):
            raise UserError(f"{file} is a file that --output {output} writes; choose another directory")
    if args.language is not None and args.language not in LANGUAGES:
        raise UserError(
            f"--language {args.language}{nearest(args.language, LANGUAGES)}; allowed: {', '.join(LANGUAGES)}"
        )
    for needed, names in (("against", ("ngram", "overlap", "against_columns")), ("language", ("language_share",))):
        told = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) not in (None, {})]
        if told and not getattr(args, needed):
            raise UserError(f"{', '.join(told)} would be ignored without --{needed}")
    ngram, overlap = args.ngram or 8, 0.5 if args.overlap is None else args.overlap
    evaluation = Contamination(args.against, ngram, overlap, args.against_columns) if args.against else None
    rules = Rules(**{f.name: x for f in fields(Rules) if (x := getattr(args, f.name)) is not None})
    report = curate(args.files, output, rules, evaluation, args.columns)
    (output / "curation.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(table(report) + f"\n\nwritten to {output}/rows.jsonl, dropped.jsonl and curation.json")
    return 0


def table(report: dict[str, Any]) -> str:
    """What stayed and what went, a line per reason; then the evaluation files."""
    counts = {"rows": report["rows"], "kept": report["kept"], **report["dropped"]}
    lines = [f"{name:16} {count:>12,} {count / report['rows']:8.2%}" for name, count in counts.items()]
    for file in report["evaluation"]:
        share = file["contaminated"] / file["prompts"]
        short = f"; {file['too_short']:,} are shorter than the n-gram" if file["too_short"] else ""
        lines.append(f"{file['file']}: {file['contaminated']:,} of {file['prompts']:,} prompts ({share:.1%}) were in rows{short}")  # fmt: skip # noqa: E501
    return "\n".join(lines)
