#!/usr/bin/env python
"""Runs commands of this package on a cluster with NeMo-Run.

    python launch/nemo_run/run.py --cluster CLUSTER sft --config examples/sft.yaml key=value...
    python launch/nemo_run/run.py --cluster CLUSTER chain launch/chains/sft_then_grpo.yaml hf=DIR problems=FILE

    python launch/nemo_run/run.py --cluster CLUSTER pipeline FILE key=value...

CLUSTER is a YAML file, or the name of one in launch/clusters/. The stages of a chain, and of a pipeline, are jobs that
depend on each other.
Exit status: 0 all stages succeeded (with --detach: were submitted), 1 one failed, 2 bad input.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[1:1] = [str(HERE.parent), str(HERE.parent.parent)]  # `cluster`, and this package where not installed

import executors  # noqa: E402
import recipes  # noqa: E402
from cluster import Cluster, check, load  # noqa: E402
from recipes import Stage  # noqa: E402

from megatron_posttrain.errors import UserError  # noqa: E402


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cluster", required=True, metavar="CLUSTER", help="YAML file, or name in launch/clusters/")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="replaces a key of the cluster file"
    )
    parser.add_argument("--name", help="of the experiment (default: the command's or chain's)")
    parser.add_argument("--dry-run", action="store_true", help="print the scripts, submit nothing")
    parser.add_argument("--detach", action="store_true", help="Slurm: submit and return")
    parser.add_argument("command", help="a command of this package, a script, `chain`, or `pipeline`")
    parser.add_argument(
        "arguments", nargs=argparse.REMAINDER, help="its arguments; of the last two: FILE name=value..."
    )
    return parser.parse_args(argv)


def stages_of(args: argparse.Namespace) -> tuple[str, list[Stage]]:
    if args.command == "pipeline" and args.arguments:
        return recipes.pipeline(args.arguments[0], args.arguments[1:])
    if args.command != "chain":
        return Path(args.command).stem, recipes.single([args.command, *args.arguments])
    if not args.arguments:
        raise UserError("chain needs a file, such as launch/chains/sft_then_grpo.yaml")
    file, *values = args.arguments
    for value in values:
        if "=" not in value:
            raise UserError(f"'{value}' is not name=value")
    return recipes.chain(Path(file), dict(value.split("=", 1) for value in values))


def add(experiment: Any, run: Any, cluster: Cluster, stage: Stage, *, tail: bool, alone: bool) -> None:
    """Adds a stage; its script and batch lines name its folder, which NeMo-Run decides when it is added."""
    experiment.add(
        run.Script(inline="true"),
        executor=executors.executor(run, cluster, stage),
        name=stage.name,
        dependencies=[] if alone else list(stage.after),
        tail_logs=tail,
    )
    job = experiment.jobs[-1]
    folder = job.executor.job_dir
    if cluster.executor == "slurm":
        folder = f"{job.executor.tunnel.job_dir}/{Path(folder).name}"
        job.executor.setup_lines = executors.batch_lines(folder)
    job.task.inline = executors.script(cluster, stage, folder)


def show(experiment: Any, run: Any) -> None:
    """Prints what would be submitted, then removes it."""
    experiment.dryrun(log=False, delete_exp_dir=False)
    try:
        for job in experiment.jobs:
            batch = Path(experiment._exp_dir) / f"{job.executor.job_name}_sbatch.sh" if is_slurm(job) else None
            for file in (batch, Path(job.executor.job_dir) / "scripts" / f"{job.id}.sh"):
                if file:
                    print(f"# ---- {job.id}: {file.name}\n{file.read_text()}")
    finally:
        shutil.rmtree(experiment._exp_dir)


def is_slurm(job: Any) -> bool:
    return hasattr(job.executor, "tunnel")


def experiments(args: argparse.Namespace, cluster: Cluster, stages: list[Stage]) -> list[list[Stage]]:
    """Slurm keeps dependencies itself. Local jobs would be started after a failed one, so each is waited for."""
    return [stages] if cluster.executor == "slurm" else [[stage] for stage in stages]


def succeeded(experiment: Any) -> bool:
    """NeMo-Run's own exit status is 0 even when a job has failed."""
    good = True
    for task, state in experiment.status(return_dict=True).items():
        good = good and str(state["status"]) == "SUCCEEDED"
        print(f"launch: {task}: {state['status']}; logs in {state.get('remote_dir', state['local_dir'])}/logs")
    return good


def main(argv: Sequence[str]) -> int:
    args = parse_arguments(argv)
    cluster, file = load(args.cluster, args.set)
    name, stages = stages_of(args)
    if args.detach and cluster.executor == "local":
        raise UserError("--detach needs executor: slurm; with executor: local this process is the scheduler")
    if not args.dry_run:
        check(cluster, file)
    run = executors.nemo_run(cluster)
    for group in experiments(args, cluster, stages):
        with run.Experiment(args.name or name, enable_goodbye_message=False) as experiment:
            for stage in group:
                add(experiment, run, cluster, stage, tail=len(stages) == 1, alone=len(group) == 1)
            if args.dry_run:
                show(experiment, run)
                continue
            experiment.run(detach=args.detach)
        if args.dry_run or args.detach:
            continue
        if not succeeded(experiment):
            return 1
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
