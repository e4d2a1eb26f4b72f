#!/usr/bin/env python
"""Submits launch/slurm/train.sbatch to the cluster that a YAML file describes, after looking at it.

    python launch/slurm/submit.py --cluster CLUSTER [--dry-run] sft --config examples/sft.yaml key=value...

CLUSTER is a file, or the name of one in launch/clusters/; the job runs in its `repository`. Needs no NeMo-Run.
Exit status: 0 submitted, 1 refused by sbatch, 2 bad input.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

LAUNCH = Path(__file__).resolve().parent.parent
# Run from a clone on a login node, where nothing is installed: these are scripts, started by their path.
sys.path[1:1] = [str(LAUNCH), str(LAUNCH / "nemo_run"), str(LAUNCH.parent)]

from cluster import Cluster, check, load  # noqa: E402
from recipes import checked  # noqa: E402

from megatron_posttrain.errors import UserError  # noqa: E402


def command(cluster: Cluster, words: Sequence[str]) -> str:
    """The line that submits, as it is typed on the login node."""
    options: dict[str, str | int | bool | None] = {
        "account": cluster.account,
        "partition": cluster.partition,
        "nodes": cluster.nodes,
        "gpus-per-node": cluster.gpus_per_node or None,
        "time": cluster.time,
        **cluster.sbatch,
    }
    flags = [
        f"--{name.replace('_', '-')}" if value is True else f"--{name.replace('_', '-')}={value}"
        for name, value in options.items()
        if value is not None and value is not False
    ]
    container = ["--container", cluster.container.image] if cluster.container else []
    if cluster.container and cluster.container.mounts:
        container += ["--mounts", ",".join(cluster.container.mounts)]
    environment = dict(cluster.environment) | ({"PYTHON": cluster.python} if cluster.python else {})
    exports = "".join(f"export {name}={shlex.quote(str(value))} && " for name, value in environment.items())
    launch = ["launch/slurm/train.sbatch", *container, "--nproc-per-node", str(cluster.workers), *words]
    return f"cd {shlex.quote(str(cluster.repository))} && {exports}{shlex.join(['sbatch', *flags, *launch])}"


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cluster", required=True, metavar="CLUSTER", help="YAML file, or name in launch/clusters/")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="replaces a key of the cluster file"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the command, submit nothing")
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="COMMAND ...", help="what every node runs")
    args = parser.parse_args(argv)
    cluster, file = load(args.cluster, args.set)
    if cluster.executor != "slurm":
        raise UserError(f"{file}: executor is local; without Slurm, run: bash launch/node.sh {shlex.join(args.words)}")
    if cluster.repository is None:
        raise UserError(f"{file}: set 'repository' to a checkout on {cluster.place}, where the job will run")
    checked(args.words)
    line = command(cluster, args.words)
    if args.dry_run:
        print(line)
        return 0
    check(cluster, file)
    answer = cluster.shell(line)
    print(answer.stdout, end="")
    print(answer.stderr, end="", file=sys.stderr)
    return min(1, answer.returncode)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
