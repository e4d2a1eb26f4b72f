"""When one rank fails, its reason is what every log ends with; no worker outlives its launcher."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.helpers.launch import ROOT, command, environment, execute, torchrun

REASONS = {"user": "error: row 7 of the file is bad", "crash": "KeyError: 'unexpected unit'"}


@pytest.mark.parametrize("kind", sorted(REASONS))
def test_torchrun_ends_with_the_reason_of_the_rank_that_failed(kind: str) -> None:
    done = torchrun(2, "-m", "tests.helpers.failing_rank", kind, check=False, timeout=120)
    assert done.returncode == 1
    # Every rank that met the loss of its peer says whose fault it was.
    others = [line for line in done.stderr.splitlines() if " failed first: " in line]
    assert others
    assert all(line.endswith(f"since rank 1 failed first: {REASONS[kind]}") for line in others)
    summary = done.stderr[done.stderr.index("Root Cause") :]
    assert "rank      : 1 " in summary
    assert REASONS[kind].removeprefix("error: ") in summary


@pytest.mark.parametrize("kind", sorted(REASONS))
def test_launcher_ends_with_the_reason_and_writes_it_to_every_log(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ["bash", str(ROOT / "launch" / "node.sh"), "--nproc-per-node", "2", "--log-dir", str(tmp_path)]
    monkeypatch.setenv("PYTHON", sys.executable)
    done = execute([*line, "-m", "tests.helpers.failing_rank", kind], check=False, timeout=120)
    reason = REASONS[kind].removeprefix("error: ")
    assert done.returncode == (2 if kind == "user" else 1)
    assert reason in done.stderr.splitlines()[-1]
    logs = sorted(tmp_path.glob("attempt_0/rank_*.err"))
    assert len(logs) == 2
    for log in logs:
        assert reason in log.read_text().splitlines()[-1]


def test_workers_end_with_a_launcher_that_is_killed(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    job = subprocess.Popen(
        [*line, "-m", "tests.helpers.failing_rank", "hang", str(tmp_path)], cwd=ROOT, env=environment()
    )
    deadline = time.monotonic() + 100
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    workers = [psutil.Process(int(file.name)) for file in tmp_path.iterdir()]
    assert len(workers) == 2
    os.kill(job.pid, signal.SIGKILL)
    job.wait()
    assert not psutil.wait_procs(workers, timeout=10)[1]


def test_variables_of_a_launcher_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_posttrain.training.prepare import check_launcher

    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "1")
    check_launcher()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(Exception, match="WORLD_SIZE=2, but not LOCAL_RANK, MASTER_ADDR, MASTER_PORT"):
        check_launcher()


def test_a_mistake_that_every_process_finds_has_one_line() -> None:
    done = command("sft", "model.path=nowhere", "data.train=x", "output=y", check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: model.path")
    assert len(done.stderr.splitlines()) == 1
