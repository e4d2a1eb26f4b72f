"""`evaluate`: alone as one process, or under `torchrun`, where the engine's replicas share the prompts."""

import argparse
import os
from pathlib import Path
from typing import Any

from megatron_posttrain.cli.generation import (
    REWARD_OPTIONS,
    SET_OPTIONS,
    dtype_of,
    given,
    prepare,
    set_of,
    start_engine,
)
from megatron_posttrain.cli.generation import add_arguments as add_common
from megatron_posttrain.cli.row_options import parsed
from megatron_posttrain.errors import UserError
from megatron_posttrain.output import check_output

FILES = ("evaluation.json", "responses.jsonl")  # that it writes

MODES: dict[str, tuple[str, ...]] = {  # what is done instead of answering the prompts of --data, with which options
    "suite": ("model", "data"), "perplexity": ("model", "max_tokens", "limit"), "lm_eval": ("model", "data", "limit"),
    "compare": (), "leaderboard": (),
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_common(parser, max_tokens=256, samples=1, required=False)
    add("--environment", type=_environment, metavar="NAME", help="what answers the model's turns, or all of the "
        "config's section: '{name: search, args: {files: [a.txt]}}' (default: none)")  # fmt: skip
    add("--suite", metavar="FILE", help="YAML of several sets (see examples/suites); --data is then the directory that "
        "its file names start from (default: the suite's own)")  # fmt: skip
    add("--perplexity", metavar="FILE", help="no prompts: the perplexity of texts in windows of --max-tokens (1024), "
        "of a .txt file or of the rows' column text; --suite does it for other columns")  # fmt: skip
    add("--lm-eval", metavar="TASKS", help="lm-evaluation-harness on these, with commas between, where it is "
        "installed; --data is then a directory of further tasks; offline, one process")  # fmt: skip
    add("--leaderboard", nargs="+", metavar="DIR", help="no model: a table of what `evaluate` wrote in directories")
    add("--compare", nargs="+", metavar="DIR", help="no model: the first directory's results against each other's, "
        "prompt by prompt")  # fmt: skip
    add("--output", default="runs/evaluation", metavar="DIR", help="default: runs/evaluation")
    parser.set_defaults(check=_mode)


def run(args: argparse.Namespace) -> int:
    mode = _mode(args)
    if mode in ("compare", "leaderboard"):
        return _compare(args)
    if mode == "lm_eval":
        return _lm_eval(args)
    # First, before torch: it sets what vLLM and OpenMP read from the environment at their import.
    from megatron_posttrain.rollout import RolloutEngine  # noqa: F401

    # isort: split
    import torch.distributed as dist

    from megatron_posttrain.evaluation.evaluate import EVALUATION, evaluate, save, saved, suite_table, table
    from megatron_posttrain.evaluation.perplexity import perplexity
    from megatron_posttrain.evaluation.responses import begin
    from megatron_posttrain.parallel.groups import broadcast_object

    sets, directory = _sets(args)
    output = Path(args.output)
    places = {name: output / name if args.suite else output for name in sets}
    for place in places.values():
        check_output(place, "--output", FILES)
    job = prepare(args, sets, directory)
    engine = start_engine(args, job)
    first = dist.get_rank() == 0
    if first:
        for task in job.tasks:
            begin(places[task.name], task.settings, EVALUATION)
    results: dict[str, Any] = {}
    for task in job.tasks:
        place = places[task.name]
        if broadcast_object((place / EVALUATION).exists()):
            if first:
                results[task.name] = saved(place)
                print(f"{place}: finished before with the same settings, kept as it is", flush=True)
            continue
        if task.texts:
            size = min(task.sampling.max_tokens, job.max_model_len - 2)
            results[task.name] = perplexity(engine, job.tokenizer, task.texts, size)
        else:
            results[task.name] = evaluate(engine, job.tokenizer, task, place)
        if first:
            save(results[task.name], place, task.about)
    if first:
        print(table(results["evaluation"], task.about) if args.data and not args.suite else suite_table(results))
        print(f"\nwritten to {output}/{'SET/' if args.suite else ''}{' and '.join(FILES[: 2 - bool(args.perplexity)])}")
    engine.close()
    dist.destroy_process_group()
    return 0


def _mode(args: argparse.Namespace) -> str:
    """The one of MODES that is asked for, or data. Raises UserError for options that it would ignore, or lacks."""
    mode = next((name for name in MODES if getattr(args, name)), "data")
    takes = MODES.get(mode, ("model", *SET_OPTIONS, *REWARD_OPTIONS))
    if told := given(args, ("model", "data", *MODES, *SET_OPTIONS, *REWARD_OPTIONS)).keys() - {mode, *takes}:
        raise UserError(f"--{min(told).replace('_', '-')} would be ignored beside --{mode.replace('_', '-')}")
    if missing := [name for name in ("model", mode) if name in (*takes, mode) and not getattr(args, name)]:
        others = ", ".join(f"--{name.replace('_', '-')}" for name in MODES)
        raise UserError(f"--{missing[0]} is missing; evaluate needs --model with --data, or one of {others}")
    return mode


def _sets(args: argparse.Namespace) -> tuple[dict[str, Any], Path]:
    from megatron_posttrain.config.load import load_config
    from megatron_posttrain.evaluation.suite import EvaluationSet, Suite

    if args.perplexity:
        values = {"data": args.perplexity, "perplexity": "{{ text }}", **given(args, ("max_tokens", "limit"))}
        return {"perplexity": EvaluationSet.model_validate(values)}, Path()
    if not args.suite:
        return {"evaluation": set_of(args)}, Path()
    return load_config(Suite, args.suite).sets, Path(args.data) if args.data else Path(args.suite).parent


def _compare(args: argparse.Namespace) -> int:
    from megatron_posttrain.evaluation.compare import compare, leaderboard, read_results

    if args.leaderboard:
        print(leaderboard(args.leaderboard))
        return 0
    if len(args.compare) < 2:
        raise UserError(f"--compare {args.compare[0]}: two or more directories that `evaluate` wrote are compared")
    print(compare([read_results(Path(name)) for name in args.compare], args.compare))
    return 0


def _lm_eval(args: argparse.Namespace) -> int:
    from megatron_posttrain.checkpoint.hf import check_directory
    from megatron_posttrain.evaluation.harness import evaluate_with_harness

    if int(os.environ.get("WORLD_SIZE", "1")) > 1 or args.tensor > 1:
        raise UserError("--lm-eval runs in one process, without --tensor")
    check_output(output := Path(args.output), "--output", ("lm_eval.json",))
    check_directory(args.model, serving=True)
    tasks = args.lm_eval.split(",")
    print(evaluate_with_harness(args.model, tasks, args.data, output, dtype_of(args), args.limit, args.seed))
    print(f"\nwritten to {output}/lm_eval.json")
    return 0


def _environment(text: str) -> dict[str, Any]:
    found = parsed(text)
    if not isinstance(found, str | dict):
        raise argparse.ArgumentTypeError(f"{text!r} must be a name, or a map such as '{{name: search, args: {{}}}}'")
    return found if isinstance(found, dict) else {"name": found}
