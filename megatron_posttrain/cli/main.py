"""`megatron-posttrain COMMAND`: finds the command's module, runs it, turns errors into exit statuses."""

import argparse
import errno
import importlib
import os
import sys
from collections.abc import Callable, Sequence

from megatron_posttrain import __version__
from megatron_posttrain.config.algorithms import ALGORITHMS
from megatron_posttrain.errors import SaveError, UserError, nearest
from megatron_posttrain.failure import end_with_launcher, report

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)

# Command -> (module, one line of help), beside the algorithms' own. A module has `add_arguments(parser)` and
# `run(args) -> int`; it is imported only when its command is asked for, so `--help` and `plan` start without torch.
OTHER_COMMANDS: dict[str, tuple[str, str]] = {
    "evaluate": ("megatron_posttrain.cli.evaluate", "generate with vLLM, grade with a reward"),
    "sample": ("megatron_posttrain.cli.sample", "N graded responses a prompt: rows for sft, dpo and grpo"),
    "judge": ("megatron_posttrain.cli.judge", "models' answers compared by a judge, in both orders"),
    "serve": ("megatron_posttrain.cli.serve", "vLLM's server on a run's model, template and adapter"),
    "curate": ("megatron_posttrain.cli.curate", "filter rows: duplicates, contamination, length, language, repetition"),
    "data": ("megatron_posttrain.cli.data", "what data files hold and how they would be read"),
    "plan": ("megatron_posttrain.cli.plan", "memory, step time and best layouts of a model on a cluster"),
    "pipeline": ("megatron_posttrain.cli.pipeline", "stages with gates as one run that can be resumed"),
    "report": ("megatron_posttrain.cli.report", "one offline HTML page about runs, side by side"),
    "doctor": ("megatron_posttrain.cli.doctor", "check a config, the machine and the versions"),
}


def commands() -> dict[str, tuple[str, str]]:
    training = {name: ("megatron_posttrain.cli.train", row.help) for name, row in ALGORITHMS.items()}
    return training | OTHER_COMMANDS


def build_parser() -> argparse.ArgumentParser:
    listing = "\n".join(f"  {name:14}{text}" for name, (_, text) in commands().items())
    parser = argparse.ArgumentParser(
        prog="megatron-posttrain",
        description="Post-train open-weight language models on Megatron-Core.",
        epilog=f"commands:\n{listing}\n\nmegatron-posttrain COMMAND --help tells the options of one.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"megatron-posttrain {__version__}")
    parser.add_argument("command", metavar="COMMAND", help="what to do; see below")
    return parser


def command_parser(name: str) -> argparse.ArgumentParser:
    """Of a command of the table: its options, and `run`, its function; imports its module. Some have a `check` of the
    arguments, which needs no file."""
    module_name, text = commands()[name]
    module = importlib.import_module(module_name)
    parser = argparse.ArgumentParser(
        prog=f"megatron-posttrain {name}",
        description=text[0].upper() + text[1:] + ".",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=name, run=module.run)
    module.add_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 failed, 2 bad input."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    if not arguments or arguments[0].startswith("-"):
        parser.parse_args(arguments or ["--help"])
    name = arguments[0]
    if name not in (known := commands()):
        print(f"error: no command '{name}'{nearest(name, known)} (one of {', '.join(known)})", file=sys.stderr)
        return 2
    args = command_parser(name).parse_intermixed_args(arguments[1:])
    try:
        return args.run(args)
    except UserError as error:
        return report(error)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        return report(SaveError(f"{error.filename or 'a file of the run'} could not be written: {error.strerror}"))


def process(work: Callable[[], int] = main) -> int:
    """The exit status of `work`. A rank that fails ends here, without Python's clean-up.

    gloo's threads (torch 2.13) may drop their last Python objects while the interpreter ends, which aborts the
    process: one in six failing ranks of a busy machine was reported as killed by SIGABRT in place of status 1.
    """
    end_with_launcher()
    try:
        status = work()
    except Exception as error:
        status = report(error)
    if status and "torch.distributed" in sys.modules and sys.modules["torch.distributed"].is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status
