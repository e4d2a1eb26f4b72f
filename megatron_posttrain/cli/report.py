"""`report RUN_DIR...`: one offline HTML page about runs, evaluations and pipelines."""

import argparse
from pathlib import Path

from megatron_posttrain.output import check_output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN_DIR", help="outputs of training, evaluation or a pipeline, or what holds them")
    add("--output", metavar="FILE.html", help="the page, or a directory for report.html (default: the first RUN_DIR)")


def run(args: argparse.Namespace) -> int:
    from megatron_posttrain.report.page import build

    target = Path(args.output or args.runs[0])
    file = target if target.suffix in (".html", ".htm") else target / "report.html"
    check_output(file.parent, "--output", (file.name,))
    page = build([Path(name) for name in args.runs])
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(page, encoding="utf-8")
    print(f"{file}: {file.stat().st_size / 2**20:.1f} MiB; open it in a browser, it needs no network")
    return 0
