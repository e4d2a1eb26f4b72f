"""A rank that hangs is named, with its stack; so is one that does not run; all end by themselves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from megatron_posttrain.config.algorithms import SftConfig
from megatron_posttrain.parallel.groups import start_distributed
from megatron_posttrain.training.heartbeat import Heartbeat, last_words, spans
from megatron_posttrain.training.record import Record
from megatron_posttrain.training.timing import PhaseTimer
from tests.helpers.launch import ROOT

RANK = """
import os, signal, sys, threading, time
from pathlib import Path
from megatron_posttrain.training.heartbeat import Heartbeat
rank, ranks, directory = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])

def stuck_in_the_loader():
    time.sleep(600)

def waits_for_its_fellows():
    threading.Event().wait(600)

beat = Heartbeat(directory, rank, ranks, hang_seconds=2.0)
while len(list(directory.glob("rank_*.json"))) < ranks:
    time.sleep(0.05)
beat.start()
for step in (1, 2, 3, 4):
    beat.step(step)
    beat.enter("data")
    if step == 4 and rank == 1:
        stuck_in_the_loader()
    time.sleep(0.02)
    beat.leave()
    beat.enter("train")
    if step == 4 and rank == 2:
        time.sleep(1.0)  # until its heartbeat says so
        os.kill(os.getpid(), signal.SIGSTOP)
    if step == 4:
        waits_for_its_fellows()
    beat.leave()
"""


def test_ranks_are_named_with_phase_and_stack(tmp_path: Path) -> None:
    directory = tmp_path / "heartbeats"
    directory.mkdir()
    (directory / "hang").touch()  # of an earlier run: must not end this one
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), "4", str(directory)],
            stderr=subprocess.PIPE, text=True, env=environment,
        )
        for rank in range(4)
    ]  # fmt: skip
    try:
        outputs = [processes[rank].communicate(timeout=120)[1] for rank in (0, 1, 3)]
        assert [processes[rank].returncode for rank in (0, 1, 3)] == [1, 1, 1]
        assert processes[2].poll() is None  # frozen: the launcher's to kill
    finally:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.communicate()
    text = (directory / "hang.txt").read_text()
    assert text in outputs[0] or text.strip() in outputs[0]
    lines = text.splitlines()
    assert lines[0].startswith("HANG: rank ")
    assert "rank 2 on " in lines[1]
    assert "step 4, train; it does not run" in lines[1]
    assert "rank 1 on " in lines[2]
    assert "step 4, data" in lines[2]
    assert "stuck_in_the_loader" in "".join(lines[3:5])
    assert "ranks 0,3: step 4, train" in text
    assert "waits_for_its_fellows" in text


def test_a_healthy_run_leaves_its_last_phase(tmp_path: Path) -> None:
    beat = Heartbeat(tmp_path, 0, 1)
    assert beat.limit == 1500.0  # how long steps take is not known yet
    beat.start()
    for step in range(1, 6):
        beat.step(step)
        beat.enter("train")
        beat.enter("optimizer")
        beat.leave()
        assert beat.limit == (600.0 if step > 3 else 1500.0)
        beat.leave()
    beat.stop()
    facts = json.loads((tmp_path / "rank_0.json").read_text())
    assert facts["step"] == 5
    assert facts["phase"] == "done"
    assert not (tmp_path / "hang").exists()


def test_limit_is_the_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)  # pytest keeps its own
    tree = {"model": {"path": "m"}, "data": {"train": "d"}, "output": str(tmp_path)}
    config = SftConfig.model_validate(tree | {"logging": {"hang_seconds": 7.5, "tensorboard": False}})
    start_distributed()
    record = Record(config, 9, 0)
    for step in range(1, 6):
        assert record._heartbeat.limit == 7.5
        record.log(step, {"step_seconds": 0.0})
    record.close()
    for wrong in (0, -1, float("inf"), "soon"):
        with pytest.raises(ValidationError, match="hang_seconds"):
            SftConfig.model_validate(tree | {"logging": {"hang_seconds": wrong}})


def test_an_error_is_told_where_it_began(tmp_path: Path) -> None:
    beat = Heartbeat(tmp_path, 0, 1)
    beat.start()
    timer = PhaseTimer()
    with pytest.raises(RuntimeError), timer("train"), timer("forward"):
        raise RuntimeError
    assert "step 1, train/forward" in last_words(tmp_path, 0, 1)
    beat.stop()


def test_of_many_that_fail_one_looks_for_the_others(tmp_path: Path) -> None:
    beats = [Heartbeat(tmp_path, rank, 3) for rank in range(3)]
    first, second = last_words(tmp_path, 1, 3), last_words(tmp_path, 0, 3)
    assert "ranks 0-2: step 1" in first
    assert second == "rank 0 ends with an error, too; see rank 1"
    Heartbeat(tmp_path, 0, 3).stop()  # the next run's
    assert "ranks when they were last heard of" in last_words(tmp_path, 2, 3)
    for beat in beats:
        beat.stop()


@pytest.mark.parametrize(("ranks", "seconds"), [(1, 0.5), (200, 0.5), (4096, 10.24)])
def test_all_ranks_together_write_400_times_a_second_at_most(tmp_path: Path, ranks: int, seconds: float) -> None:
    beat = Heartbeat(tmp_path, 0, ranks)
    beat.stop()
    assert beat._write_every == pytest.approx(seconds)
    assert ranks / beat._poll <= 400  # the watcher writes what was left out


def test_spans() -> None:
    assert spans([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
