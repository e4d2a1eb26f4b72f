"""`curate FILE...`: rows worth training on, without a model; every dropped row aside with its reason."""

import argparse
import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_posttrain.cli.row_options import add_columns
from megatron_posttrain.curation.curate import DROPPED, KEPT, Rules, curate, option
from megatron_posttrain.errors import UserError
from megatron_posttrain.output import check_output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE", help="JSON lines or array, CSV (.gz, .zst too), Parquet, a dataset")
    add("--output", default="runs/curated", metavar="DIR", help="rows.jsonl, dropped.jsonl, curation.json go there "
        "(default: runs/curated)")  # fmt: skip
    add_columns(parser)
    add_columns(parser, "--against-columns", "of evaluation files, as data.columns")
    for name, info in Rules.model_fields.items():
        what = f"{info.description} (default: {info.default or 'none'})"
        add(option(name), nargs="+" if name == "against" else None, metavar="X", help=what)
    parser.set_defaults(check=_rules)


def run(args: argparse.Namespace) -> int:
    output = Path(args.output)
    check_output(output, "--output", (KEPT, DROPPED, "curation.json"))
    for file in (*args.files, *(args.against or ())):
        if Path(file).resolve() in ((output / name).resolve() for name in (KEPT, DROPPED)):
            raise UserError(f"{file} is a file that --output {output} writes; choose another directory")
    report = curate(args.files, output, _rules(args), args.columns, args.against_columns)
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


def _rules(args: argparse.Namespace) -> Rules:
    if args.against_columns and not args.against:
        raise UserError("--against-columns would be ignored without --against")
    try:
        return Rules.model_validate({f: x for f in Rules.model_fields if (x := getattr(args, f)) is not None})
    except ValidationError as error:
        first = error.errors()[0]
        where = f"{option(str(first['loc'][0]))} {first['input']}: " if first["loc"] else ""
        raise UserError(where + first["msg"].removeprefix("Value error, ")) from None
