"""`pipeline FILE`: stages with gates as one run that can be stopped anywhere and goes on."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_posttrain.config.load import describe
from megatron_posttrain.errors import UserError, nearest

if TYPE_CHECKING:
    from megatron_posttrain.pipeline.graph import Pipeline


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from megatron_posttrain.pipeline.graph import PipelineConfig

    add = parser.add_argument
    add("file", metavar="FILE", help="YAML: `output`, `values`, `stages`; its `defaults: [base.yaml]` are read first")
    add("--dry-run", action="store_true", help="check every stage, print the plan, run nothing")
    add("--assume", metavar="8xH100", help="with --dry-run: GPUs of a stage; memory and step time of each")
    add("--only", metavar="STAGE", help="run this one alone; what it waits for must be done")
    add("--part", choices=("begin", "end"), help="with --only: before, or after, a job of its own that runs the stage")
    add("overrides", nargs="*", metavar="key.sub=value", help="take precedence over the file")
    shown = [line.replace(" stages.", " stages.NAME.") for line in describe(PipelineConfig) if " stages =" not in line]
    parser.epilog = "\n".join(["keys of FILE (key = default):", *shown, "", EPILOG])


EPILOG = """In `run`, ${values.X} is a value, ${output} the stage's own directory, ${stage} that of another stage and
${stage.hf} what is called hf in it. A stage that is done runs again only when the content of something that it depends
on has changed. Exit status: 0 done, 1 a stage or a gate failed, 2 bad input, 75 stopped on request: run it again."""


def read(file: str, overrides: Sequence[str]) -> "Pipeline":
    """A checked pipeline. Raises UserError."""
    from megatron_posttrain.cli.main import command_parser, commands
    from megatron_posttrain.pipeline import graph

    def parse(command: str, words: Sequence[str]) -> argparse.Namespace:
        parser = command_parser(command)

        def refuse(message: str) -> None:
            raise UserError(message)

        parser.error = refuse  # type: ignore[method-assign, assignment]
        args = parser.parse_intermixed_args(list(words))
        if check := parser.get_default("check"):
            check(args)
        return args

    return graph.load(file, overrides, commands(), parse)


def run(args: argparse.Namespace) -> int:
    if args.assume and not args.dry_run:
        raise UserError("--assume is for --dry-run")
    if (args.only and args.dry_run) or (args.part and not args.only):
        raise UserError("--dry-run shows all stages, without --only" if args.dry_run else "--part is for --only")
    pipeline = read(args.file, args.overrides)
    if args.only not in (None, *pipeline.stages):
        raise UserError(f"--only {args.only}: no such stage{nearest(args.only, pipeline.stages)}")
    if args.dry_run:
        from megatron_posttrain.pipeline.plan import show

        return show(pipeline, args.assume)
    from megatron_posttrain.pipeline.run import run as run_stages

    return run_stages(pipeline, args.only, args.part)
