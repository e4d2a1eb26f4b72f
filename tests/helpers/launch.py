"""Starts ranks for a test and shows what they said when they fail."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
# Configs of training commands; recipes and suites are files of others
EXAMPLES = sorted(file for file in (ROOT / "examples").rglob("*.yaml") if not {"suites", "recipes"} & {*file.parts})
Done = subprocess.CompletedProcess[str]


def torchrun(processes: int, *arguments: str, check: bool = True, timeout: int = 600) -> Done:
    """`torchrun --nproc-per-node N ARGUMENTS` in the repository's root."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return execute([*command, *arguments], check=check, timeout=timeout)


def ranks(
    processes: int, *arguments: str, check: bool = True, timeout: int = 600, rollout: bool = False, te: bool = False
) -> Done:
    """As `torchrun`, by forks of a process that has imported everything, vLLM too where `rollout`: 7 CPU seconds less a
    rank, 9 more with vLLM. `te`: what `python -m tests.te` would run."""
    with tempfile.TemporaryDirectory() as directory:
        files = {name: Path(directory, name) for name in ("stdin", "stdout", "stderr")}
        for file in files.values():
            file.touch()
        job = {"processes": processes, "line": arguments, "rollout": rollout, "environment": environment()}
        status = _warm("te" if te else "").run(job | {name: str(file) for name, file in files.items()}, timeout)
        done = Done(arguments, status, files["stdout"].read_text(), files["stderr"].read_text())
    return checked(done, check)


@contextlib.contextmanager
def killed(processes: int, *arguments: str, rollout: bool = False) -> Iterator[threading.Thread]:
    """Ranks while the block lasts: they get SIGKILL at its end."""
    job = threading.Thread(target=ranks, args=(processes, *arguments), kwargs={"check": False, "rollout": rollout})
    job.start()
    yield job
    supervisors = psutil.Process(_warm("").process.pid).children()
    alive = [rank for supervisor in supervisors for rank in supervisor.children()]
    assert alive, "the run ended before it could be killed"
    for rank in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            rank.kill()
    job.join()


def forked(*arguments: str, check: bool = True, timeout: int = 600, rollout: bool = False) -> Done:
    """`python ARGUMENTS` as one process without torchrun, by a fork as above."""
    return ranks(0, *arguments, check=check, timeout=timeout, rollout=rollout)


class Warm:
    """tests/helpers/warm.py as a process, ended with its ranks when this one ends or a job takes too long."""

    def __init__(self, kind: str) -> None:
        line = [sys.executable, "-m", "tests.helpers.warm", kind]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            line, cwd=ROOT, env=environment(), stdin=pipe, stdout=pipe, text=True, start_new_session=True
        )

    def run(self, job: dict[str, object], timeout: int) -> int:
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps(job) + "\n")
        stdin.flush()
        try:
            if not select.select([stdout], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(str(job["line"]), timeout)
        except BaseException:  # the answer to this job must not be taken for the next one's
            os.killpg(self.process.pid, signal.SIGKILL)
            _warm.cache_clear()
            raise
        status = stdout.readline()
        assert status, "tests/helpers/warm.py has ended; what it said is above"
        return int(status)


_warm = functools.cache(Warm)


def command(*arguments: str, check: bool = True, rollout: bool = False) -> Done:
    """`megatron-posttrain ARGUMENTS` as one process."""
    return forked("-m", "megatron_posttrain", *arguments, check=check, rollout=rollout)


def cold(*arguments: str) -> Done:
    """`python ARGUMENTS` as a user starts it."""
    return execute([sys.executable, *arguments], check=True, timeout=600)


def environment() -> dict[str, str]:
    changed = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        changed.pop(name, None)  # of a test that made itself a world of one
    return changed


def execute(line: list[str], *, check: bool, timeout: int) -> Done:
    return checked(
        subprocess.run(line, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout), check
    )


def checked(done: Done, check: bool) -> Done:
    if check and done.returncode:
        lines = (done.stdout + done.stderr).splitlines()
        tail = "\n".join([line for line in lines if "[rank" in line][-30:] or lines[-60:])
        raise AssertionError(f"{' '.join(done.args)} exited with {done.returncode}:\n{tail}")
    return done
