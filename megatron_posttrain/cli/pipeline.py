"""`pipeline FILE`: stages with gates as one run that can be stopped anywhere and goes on."""

import argparse
from collections.abc import Sequence

from megatron_posttrain.config.load import describe
from megatron_posttrain.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from megatron_posttrain.pipeline.graph import PipelineConfig

    add = parser.add_argument
    add("file", metavar="FILE", help="YAML: `output`, `values`, `stages`; its `defaults: [base.yaml]` are read first")
    add("--dry-run", action="store_true", help="check every stage, print the plan, run nothing")
    add("--assume", metavar="8xH100", help="with --dry-run: GPUs of a stage; memory and step time of each")
    add("overrides", nargs="*", metavar="key.sub=value", help="take precedence over the file")
    shown = [line.replace(" stages.", " stages.NAME.") for line in describe(PipelineConfig) if " stages =" not in line]
    parser.epilog = "\n".join(["keys of FILE (key = default):", *shown, "", EPILOG])


EPILOG = """In `run`, ${values.X} is a value, ${output} the stage's own directory, ${stage} that of another stage and
${stage.hf} what is called hf in it. A stage that is done runs again only when the content of something that it depends
on has changed. Exit status: 0 done, 1 a stage or a gate failed, 2 bad input, 75 stopped on request: run it again."""


def run(args: argparse.Namespace) -> int:
    from megatron_posttrain.cli.main import command_parser, commands
    from megatron_posttrain.pipeline import graph

    def parse(command: str, words: Sequence[str]) -> argparse.Namespace:
        parser = command_parser(command)

        def refuse(message: str) -> None:
            raise UserError(message)

        parser.error = refuse  # type: ignore[method-assign, assignment]
        return parser.parse_intermixed_args(list(words))

    if args.assume and not args.dry_run:
        raise UserError("--assume is for --dry-run")
    pipeline = graph.load(args.file, args.overrides, commands(), parse)
    if args.dry_run:
        from megatron_posttrain.pipeline.plan import show

        return show(pipeline, args.assume)
    from megatron_posttrain.pipeline.run import run as run_stages

    return run_stages(pipeline)
