"""Runs one node's share of a job: `torchrun`, with what a cluster needs around it.

    python launch/node.py [torchrun's options] [options below] sft --config F key=value...

Takes torchrun's options and starts the workers with torchrun's own agent; what is to run is a command of
this package, or anything that torchrun takes (`script.py`, `-m module`). Around it:

- The nodes sign in with each other first; different settings, an unreachable head node or a port in use
  end the job with one message, before any model is built.
- A node that dies, freezes or loses its network ends the job within `--node-timeout` seconds, by name.
- SIGTERM and SIGUSR1 ask every worker to save a checkpoint and stop (torchrun itself would kill them after
  30 s). So does a file `LOG_DIR/attempt_A/stop`. The workers then end with status 75, and so does this.
- Every rank writes `LOG_DIR/attempt_A/rank_RRRRR.out` and `.err`; rank 0 also to the terminal. A is 0, and
  one more each time that Slurm requeues the job.

Exit status: 0 done, 1 failed, 2 bad input, 75 stopped on request with a checkpoint saved: run it again.
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import signal
import socket
import sys
import threading
import time
from importlib import metadata
from pathlib import Path

import psutil
import torch
from roll_call import Card, RollCall
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.api import LogsDest, LogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, get_args_parser

from megatron_posttrain.cli.main import commands
from megatron_posttrain.errors import UserError, nearest

STOPPED = 75  # EX_TEMPFAIL in sysexits.h: "try again later"
BAD_INPUT = 2
HOST = os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def say(text: str) -> None:
    print(f"launch [{HOST}]: {text}", file=sys.stderr, flush=True)


# Arguments


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = get_args_parser()
    parser.description, parser.formatter_class = __doc__, argparse.RawDescriptionHelpFormatter
    parser.set_defaults(nnodes="1", nproc_per_node=None, log_dir="runs/logs", signals_to_handle="SIGINT,SIGHUP,SIGQUIT")
    group = parser.add_argument_group("launch")
    group.add_argument(
        "--slurm",
        action="store_true",
        help="take node count, node rank, head node, port and run id from the environment that srun sets",
    )
    group.add_argument(
        "--join-timeout",
        type=float,
        default=300.0,
        help="seconds to wait for all nodes to come (default 300)",
    )
    group.add_argument(
        "--node-timeout",
        type=float,
        default=60.0,
        help="seconds of silence before a node is lost (default 60)",
    )
    group.add_argument("--chdir", metavar="DIR", help="run there (default: the current directory)")
    args = parser.parse_args(argv)
    name = args.training_script
    if not (args.module or args.no_python or name.endswith(".py")):
        if name not in (known := commands()):
            raise UserError(f"no command '{name}'{nearest(name, known)} (one of {', '.join(known)})")
        args.module, args.training_script = True, "megatron_posttrain"
        args.training_script_args = [name, *args.training_script_args]
    change_directory(args)
    if args.slurm:
        take_from_slurm(args)
    if not args.nnodes.isdigit() or int(args.nnodes) < 1:
        raise UserError(f"--nnodes is '{args.nnodes}'; a parallel layout needs one number of nodes, 1 or more")
    if args.rdzv_backend not in ("static", "c10d"):
        raise UserError(f"--rdzv-backend is '{args.rdzv_backend}'; it can be static or c10d")
    if args.rdzv_backend == "c10d" and int(args.nnodes) > 1 and not args.rdzv_endpoint:
        raise UserError("--rdzv-backend c10d needs --rdzv-endpoint HOST:PORT, HOST being one of the nodes")
    args.nproc_per_node = args.nproc_per_node or str(max(1, torch.cuda.device_count()))
    args.master_port = args.master_port or 29500
    return args


def change_directory(args: argparse.Namespace) -> None:
    if args.chdir:
        try:
            os.chdir(args.chdir)
        except OSError as error:
            raise UserError(f"--chdir is {args.chdir}: {error.strerror} on {HOST}") from None


def take_from_slurm(args: argparse.Namespace) -> None:
    environment = os.environ
    needed = ("SLURM_JOB_ID", "SLURM_STEP_NUM_NODES", "SLURM_STEP_NUM_TASKS", "SLURM_NODEID")
    absent = [name for name in needed if name not in environment]
    if absent:
        raise UserError(f"--slurm, but {', '.join(absent)} is not set: start this with srun inside a Slurm job")
    nodes, tasks = environment["SLURM_STEP_NUM_NODES"], environment["SLURM_STEP_NUM_TASKS"]
    if nodes != tasks:
        raise UserError(
            f"srun started {tasks} tasks on {nodes} nodes; it must be one per node, which starts the workers "
            "itself: use --ntasks-per-node=1, and --nproc-per-node for the workers"
        )
    if args.nnodes not in ("1", nodes):
        raise UserError(f"--nnodes is {args.nnodes}, but Slurm gave {nodes} nodes: leave --nnodes out, or equal")
    args.nnodes, args.node_rank = nodes, int(environment["SLURM_NODEID"])
    # srun's own address is that of the batch script's node, the first of the job and of the step.
    args.master_addr = environment.get("HEAD_ADDRESS") or environment["SLURM_LAUNCH_NODE_IPADDR"]
    # Jobs that share a node must not share a port; job ids differ.
    args.master_port = args.master_port or 20000 + int(environment["SLURM_JOB_ID"]) % 10000
    args.rdzv_id = f"slurm-{environment['SLURM_JOB_ID']}-{environment.get('SLURM_RESTART_COUNT', '0')}"
    args.nproc_per_node = args.nproc_per_node or environment.get("SLURM_GPUS_ON_NODE")


def endpoint(args: argparse.Namespace) -> tuple[str, int]:
    if args.rdzv_backend == "static" and not args.rdzv_endpoint:
        return args.master_addr, args.master_port
    host, _, port = args.rdzv_endpoint.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"--rdzv-endpoint is '{args.rdzv_endpoint}'; it must be HOST:PORT")
    return host, int(port)


def versions() -> str:
    """What must be alike on all nodes, since ranks of different versions fail in strange places."""
    found = [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    for name in ("megatron-core", "transformers", "megatron-posttrain"):
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"{name} not installed")
    return ", ".join(found)


def sign_in(args: argparse.Namespace, stop: threading.Event) -> RollCall | None:
    nodes = int(args.nnodes)
    if nodes == 1:
        return None
    host, port = endpoint(args)
    card = Card(
        host=HOST,
        rank=args.node_rank if args.rdzv_backend == "static" else -1,
        run_id=args.rdzv_id,
        nodes=nodes,
        processes=int(args.nproc_per_node),
        command=" ".join([args.training_script, *args.training_script_args]),
        versions=versions(),
    )
    return RollCall(card, host, port, join_timeout=args.join_timeout, stopped=stop.is_set)


# Logs


REQUEUES = int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def log_folder(log_dir: str, restarts: int = 0) -> Path:
    return Path(log_dir) / f"attempt_{REQUEUES + restarts}"


class RankLogs(LogsSpecs):
    """A file per global rank, overwritten by no later attempt; the first rank's also on the terminal."""

    @property
    def root_log_dir(self) -> str:
        return str(self._root_log_dir)

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        folder = log_folder(self.root_log_dir, int(envs[0]["TORCHELASTIC_RESTART_COUNT"]))
        folder.mkdir(parents=True, exist_ok=True)
        stems = {local: str(folder / f"rank_{int(env['RANK']):05d}") for local, env in envs.items()}
        out = {local: f"{stem}.out" for local, stem in stems.items()}
        err = {local: f"{stem}.err" for local, stem in stems.items()}
        errors = {local: f"{stem}.error.json" for local, stem in stems.items()}
        for local, file in errors.items():
            Path(file).unlink(missing_ok=True)  # of an earlier run with this log folder
            envs[local]["TORCHELASTIC_ERROR_FILE"] = file
        first = [local for local, env in envs.items() if env["RANK"] == "0"]
        return LogsDest(
            stdouts=out,
            stderrs=err,
            tee_stdouts={local: out[local] for local in first},
            tee_stderrs={local: err[local] for local in first},
            error_files=errors,
        )


def last_lines(path: Path, count: int = 20) -> str:
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    return "".join(f"\n    | {line}" for line in lines[-count:] if line.strip())


def reason_of(failure: ProcessFailure) -> str:
    """What a rank wrote into its error file about its end; empty when it could not."""
    data = failure.error_file_data
    message = data.get("message") if isinstance(data, dict) else None
    return (
        str(message["message"]).removeprefix("UserError: ").removeprefix("SaveError: ")
        if isinstance(message, dict)
        else ""
    )


def write_to_logs(folder: Path, text: str) -> None:
    """Into every rank's log of this node: one that was killed with the others could not write why."""
    for log in sorted(folder.glob("rank_*.err")):
        with log.open("a") as file:
            file.write(f"launch [{HOST}]: {text}\n")


# Running


class Node:
    """This node's part of the job, from signing in to the exit status."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.stop = threading.Event()
        self.ended = threading.Event()
        self.lost = ""
        self.stop_file = log_folder(args.log_dir) / "stop"
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, lambda number, frame: self.request_stop())
        self.roll_call: RollCall | None = None

    def run(self) -> int:
        try:
            self.roll_call = sign_in(self.args, self.stop)
        except InterruptedError:
            say("asked to stop before all nodes had come")
            return STOPPED
        if self.roll_call is None or self.roll_call.serves:
            self.stop_file.unlink(missing_ok=True)  # of an earlier run with this log folder
        if self.roll_call:
            self.roll_call.watch(self.args.node_timeout, self.lose, self.request_stop)
            if self.roll_call.serves:
                say(f"{self.args.nnodes} nodes: {', '.join(card.name for card in self.roll_call.members)}")
        threading.Thread(target=self._poll, daemon=True).start()
        failures = self._launch()
        self.ended.set()
        status, text = self._outcome(failures)
        if self.roll_call is None or self.roll_call.serves:
            # For the batch script: srun's own status is that of the node that it ended first.
            self.stop_file.with_name("status").write_text(f"{status}\n")
        return self._conclude(status, text)

    def _launch(self) -> dict[int, ProcessFailure]:
        """Runs the workers; what failed, by global rank."""
        args = self.args
        if args.rdzv_backend == "c10d" and self.roll_call:
            args.rdzv_conf = f"{args.rdzv_conf},is_host={str(self.roll_call.serves).lower()}".lstrip(",")
        elif not self.roll_call:
            args.rdzv_backend, args.rdzv_endpoint = "c10d", "localhost:0"
        config, entrypoint, arguments = config_from_args(args)
        config.logs_specs = RankLogs(log_dir=args.log_dir)
        config.log_line_prefix_template = "[rank ${rank}] "
        try:
            elastic_launch(config, entrypoint)(*arguments)
        except ChildFailedError as error:
            return error.failures
        return {}

    def request_stop(self) -> None:
        """Asks the workers to save and stop. From a signal, the stop file, or another node."""
        if not self.stop.is_set():
            self.stop.set()
            say("asked to stop: the workers finish their step, save a checkpoint and end")
        for worker in psutil.Process().children():
            # The process alone, not its group: helpers of a worker would die of the signal in mid-save.
            worker.send_signal(signal.SIGUSR1)

    def _poll(self) -> None:
        passed_on = False
        while not self.ended.wait(0.5):
            if not self.stop.is_set() and self.stop_file.exists():
                self.request_stop()
            if self.stop.is_set() and self.roll_call and not passed_on:
                passed_on = True
                self.roll_call.pass_on_stop()

    def lose(self, message: str) -> None:
        """Another node is gone or has failed: the workers here would wait for it, so they are killed."""
        self.lost = message
        say(f"ENDING: {message}")
        for worker in psutil.Process().children():
            worker.kill()
        leave_after(30, 1)

    def _outcome(self, failures: dict[int, ProcessFailure]) -> tuple[int, str]:
        """Exit status of this node, and a sentence about it."""
        if self.lost:
            return 1, self.lost
        if not failures:
            return 0, ""
        # A rank that knows why it failed has said so in its error file; one that lost its peers has none.
        rank, first = min(failures.items(), key=lambda item: (not reason_of(item[1]), item[1].timestamp))
        code = first.exitcode
        log = log_folder(self.args.log_dir, self.args.max_restarts) / f"rank_{rank:05d}.err"
        if code == STOPPED or (self.stop.is_set() and code in (-signal.SIGUSR1, -signal.SIGTERM)):
            return STOPPED, "stopped on request"
        if code == BAD_INPUT:
            return BAD_INPUT, f"rank {rank} refused its input: {reason_of(first) or f'see above, or {log}'}"
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        if code == -signal.SIGKILL:
            how += " (out of memory? see dmesg on that node)"
        reason = f"\n    {reason_of(first)}" if reason_of(first) else ""
        return 1, f"rank {rank} on {HOST} {how}; its log: {log}{last_lines(log)}{reason}"

    def _conclude(self, status: int, text: str) -> int:
        """Says how it ended. Waits for the other nodes for some seconds, to name the first that failed."""
        failed = status not in (0, STOPPED)
        if self.lost:
            return status
        first = ""
        if self.roll_call:
            leave_after(60, status)
            try:
                first = self._first_to_fail(self.roll_call, status, text)
            except RuntimeError:
                first = f"the head node {self.roll_call.members[0].name} is gone"
        if failed:
            write_to_logs(log_folder(self.args.log_dir, self.args.max_restarts), f"FAILED: {first or text}")
        if first and first != text:
            say(f"FAILED because {first}")
            say(f"on this node: {text.splitlines()[0]}")
        elif text and (first or not self.roll_call or self.roll_call.serves):
            say(f"FAILED: {text}" if failed else text)
        return status

    def _first_to_fail(self, roll_call: RollCall, status: int, text: str) -> str:
        failed = status not in (0, STOPPED)
        roll_call.report(status, text, failed=failed)
        deadline = time.monotonic() + (15.0 if failed else 50.0)
        while roll_call.reported() < roll_call.card.nodes and time.monotonic() < deadline:
            if failed and (silent := roll_call.silent(6.0)):
                return f"{silent} died, froze or lost its network"
            time.sleep(2 * roll_call.patience)
        outcomes = roll_call.outcomes() if roll_call.serves else []
        roll_call.leave(15.0)
        return next((end["text"] for end in outcomes if end["status"] not in (0, STOPPED)), "")


def leave_after(seconds: float, status: int) -> None:
    """A bound on the end: calls to the store of a frozen head node never return."""
    timer = threading.Timer(seconds, os._exit, [status])
    timer.daemon = True
    timer.start()


def main() -> int:
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # else every rank takes all cores; torchrun says so at length
    if "LOGLEVEL" not in os.environ:  # torchrun's variable; its messages repeat what is said here
        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        return Node(parse_arguments(sys.argv[1:])).run()
    except UserError as error:
        say(f"error: {error}")
        return BAD_INPUT
    except SignalException as error:
        say(f"ended by {error.sigval.name}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
