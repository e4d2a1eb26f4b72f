"""A job of a scheduler stops while there is time for a checkpoint."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from megatron_posttrain.training.deadline import END, OUT_OF_TIME, SAVE_BYTES_PER_S, Deadline
from tests.helpers.launch import ROOT, command
from tests.helpers.models import make_assets


def test_two_steps_and_a_save_fit_after_the_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 190 s, a checkpoint of 427 GB: Slurm's signal 120 s before the end would come in mid-step."""
    step, save_bytes, limit = 190.0, 427e9, 4 * 3600.0
    monkeypatch.setenv(END, str(limit))
    times = iter(step * n for n in range(1000))
    deadline = Deadline(int(save_bytes), lambda: next(times))
    stopped = next(n for n in range(1, 1000) if deadline.near()) * step
    left = limit - stopped
    assert step + save_bytes / SAVE_BYTES_PER_S <= left < 3 * step + save_bytes / SAVE_BYTES_PER_S


def test_without_a_limit_it_never_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (None, ""):
        monkeypatch.delenv(END, raising=False) if value is None else monkeypatch.setenv(END, value)
        assert not Deadline(10**15).near()


def test_a_run_stops_for_its_time_and_tells_the_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assets, note = make_assets(tmp_path), tmp_path / "out_of_time"
    monkeypatch.setenv(END, "1")  # long ago
    monkeypatch.setenv(OUT_OF_TIME, str(note))
    words = [f"model.path={assets / 'model'}", f"data.train={assets / 'train.jsonl'}", f"output={tmp_path / 'run'}"]
    words += ["precision.dtype=fp32", "data.sequence_length=64", "training.global_batch_size=2", "training.steps=3"]
    done = command("sft", *words, "logging.tensorboard=false", check=False)
    assert done.returncode == 75, done.stderr
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_000001"]
    assert note.exists()


@pytest.mark.parametrize(("why", "queued"), [("late", True), ("asked", False)])
def test_the_batch_script_requeues_only_for_its_time(tmp_path: Path, why: str, queued: bool) -> None:
    """A stop that somebody asked for is a stop."""
    stand_ins = tmp_path / "bin"
    stand_ins.mkdir()
    programs = {
        "squeue": "echo 2026-11-26T12:00:00",
        "scontrol": 'echo "scontrol $*"',
        "srun": 'echo "end $POSTTRAIN_JOB_END"; [[ $1 == late ]] && touch "$POSTTRAIN_OUT_OF_TIME"; exit 75',
    }
    for name, line in programs.items():
        (stand_ins / name).write_text(f"#!/bin/bash\n{line}\n")
        (stand_ins / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{stand_ins}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "TZ": "UTC"}
    environment.pop("SLURM_JOB_END_TIME", None)
    script = f"logs={tmp_path}/logs; source launch/slurm/job.sh; srun {why}"
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 75, done.stderr
    assert "end 1795694400" in done.stdout
    assert ("scontrol requeue 7" in done.stdout) is queued
