"""`doctor`: checks the machine, a config and, on an assumed cluster, its memory; says what to fix. Needs no GPU."""

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path

from megatron_posttrain.config.algorithms import ALGORITHMS
from megatron_posttrain.doctor.findings import Findings
from megatron_posttrain.errors import UserError

FILE_WIDTH = 150  # columns, where the output is no terminal
STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red", "not checked here": "dim"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--config", metavar="FILE", help="YAML file of the job; left out: the machine alone is checked")
    add("--command", choices=tuple(ALGORITHMS), dest="job", help="whose config it is (default: found by its keys)")
    add("--assume", metavar="8xH100", help="GPUs that it will run on: layout and memory are checked for them, and what "
        "is not on this machine is marked, not failed")  # fmt: skip
    add("--ranks", type=int, help="check the layout for so many (default: torchrun's, --assume's, or the fewest)")
    add("--model", help="shapes to assume when model.path is not here: a known name, a directory or a config.json")
    add("--bandwidth", action="store_true", help="under torchrun: measure collectives and every link of the ring")
    add("--bandwidth-mib", type=int, default=64, help="MiB of the largest message (default: 64)")
    add("--json", action="store_true", help="print JSON instead of a table")
    add("overrides", nargs="*", metavar="key.sub=value", help="take precedence over the file")
    parser.epilog = "Exit status: 0 when nothing failed, 2 otherwise."


def run(args: argparse.Namespace) -> int:
    from megatron_posttrain.doctor import machine
    from megatron_posttrain.training.process import finish, quiet_libraries

    if args.overrides and not args.config:
        raise UserError(f"override '{args.overrides[0]}' without --config FILE")
    if args.ranks is not None and args.ranks < 1:
        raise UserError(f"--ranks {args.ranks}: at least 1")
    quiet_libraries()
    findings = Findings()
    machine.check_versions(findings)
    machine.check_device(findings)
    machine.check_compiler(findings)
    machine.check_ports(findings)
    machine.check_network(findings)
    if args.config:
        _check_job(args, findings)
    else:
        machine.check_disk(findings, Path("runs"), None)
    if args.bandwidth:
        from megatron_posttrain.doctor.bandwidth import check_bandwidth

        check_bandwidth(findings, args.bandwidth_mib)
    if os.environ.get("RANK", "0") == "0":
        if args.json:
            print(json.dumps({"failed": findings.failed, "findings": [asdict(f) for f in findings]}, indent=1))
        else:
            _print(findings)
    finish()
    return 2 if findings.failed else 0


def _check_job(args: argparse.Namespace, findings: Findings) -> None:
    from megatron_posttrain.doctor.job import Cluster, JobCheck, disk_gib, fewest_ranks, read_config
    from megatron_posttrain.doctor.machine import check_disk

    cluster = Cluster.parse(args.assume) if args.assume else None
    found = findings.attempt(
        "config",
        lambda: read_config(args.job, args.config, args.overrides),
        lambda found: f"{args.config}: a config of `{found[0]}`",
    )
    if found is None:
        return
    command, config = found
    known = cluster.gpus if cluster else int(os.environ.get("WORLD_SIZE", "0"))
    ranks = args.ranks or known or fewest_ranks(config)
    job = JobCheck(findings, command, config, ranks, cluster, args.model)
    job.run()
    # The assumed machines have disks of their own.
    check_disk(findings, config.output_dir, None if cluster else disk_gib(config, job.arch))


def _print(findings: Findings) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=FILE_WIDTH)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("", "check", "found", "to fix"):
        table.add_column(name, overflow="fold", no_wrap=name in ("", "check"))
    for f in findings:
        table.add_row(Text(f.status, STYLES[f.status]), f.check, Text(f.found), Text(f.fix))
    console.print(table)
    counts = [f"{sum(f.status == s for f in findings)} {s}" for s in STYLES if any(f.status == s for f in findings)]
    console.print(", ".join(counts))
