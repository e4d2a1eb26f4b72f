"""A two-node Slurm for this session's tests, or the reason why there is none."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.helpers.launch import ROOT

sys.path[1:1] = [str(ROOT / "launch"), str(ROOT / "launch" / "nemo_run")]
CLUSTER = ROOT / "tests" / "slurm" / "cluster.sh"
FINAL = ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT")


class Slurm:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.environment = os.environ | {
            "SLURM_DIR": str(directory),
            "SLURM_CONF": str(directory / "etc" / "slurm.conf"),
            "BASE_PORT": str(free_ports(20)),
            "OMP_NUM_THREADS": "1",
            "PYTHON": sys.executable,
        }

    def run(self, *line: str, timeout: int = 200) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            line, cwd=ROOT, env=self.environment, capture_output=True, text=True, check=False, timeout=timeout
        )

    def python(self, script: str, *line: str, timeout: int = 200) -> subprocess.CompletedProcess[str]:
        return self.run(sys.executable, script, *line, timeout=timeout)

    def submit(self, *line: str) -> str:
        """`sbatch`; the job's id."""
        done = self.run("sbatch", "--parsable", *line)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def state(self, job: str) -> str:
        words = self.run("scontrol", "show", "job", job).stdout.split()
        return next(word.partition("=")[2] for word in words if word.startswith("JobState="))

    def wait(self, job: str, seconds: float) -> str:
        """The state in which `job` ends within `seconds`."""
        return wait_until(seconds, f"job {job} to end", lambda: self.state(job) if self.state(job) in FINAL else "")

    def kill_node(self, job: str, node: str) -> None:
        """SIGKILL to all that runs of `job` on `node`, and to the node's daemon: as if it had lost power."""
        daemon = psutil.Process(int((self.directory / "run" / f"slurmd-{node}.pid").read_text()))
        victims = {daemon}
        for process in psutil.process_iter():
            try:
                environment = process.environ()
            except psutil.Error:
                continue
            if environment.get("SLURMD_NODENAME") == node and environment.get("SLURM_JOB_ID") == job:
                victims |= {process, process.parent() or process}  # the parent of the first is slurmstepd
        daemon.kill()
        for process in victims - {daemon}:
            process.kill()


def wait_until(seconds: float, what: str, condition: Callable[[], str]) -> str:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if answer := condition():
            return answer
        time.sleep(0.2)
    raise AssertionError(f"waited {seconds} s for {what}")


def free_ports(count: int) -> int:
    """The first of `count` neighbouring ports that nobody listens on."""
    for _ in range(100):
        first = random.randrange(12000, 30000)
        try:
            for port in range(first, first + count):
                socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        return first
    raise AssertionError(f"no {count} free ports in a row")


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    # Short: the paths of sockets in it are limited to about 100 characters.
    directory = Path(f"/tmp/posttrain-slurm-{os.getpid()}")
    cluster = Slurm(directory)
    started = cluster.run(str(CLUSTER), "start", timeout=500)
    try:
        if started.returncode == 77:
            pytest.skip(started.stderr.strip().splitlines()[-1])
        assert started.returncode == 0, started.stdout + started.stderr
        yield cluster
    finally:
        if started.returncode != 77:
            cluster.run(str(CLUSTER), "stop")
            subprocess.run(["rm", "-r", str(directory)], check=True)
