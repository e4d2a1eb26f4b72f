"""Killed with SIGKILL at random moments, also while a checkpoint is written: the run that was not, to the last bit."""

from __future__ import annotations

import contextlib
import json
import random
import time
from pathlib import Path

import pytest

from tests.helpers import launch
from tests.helpers.models import make_assets
from tests.helpers.preference_models import write_rows
from tests.training.test_resume import arguments, metrics

KILLS, STEPS = 10, 40


def lines(run: Path) -> list[str]:
    file = run / "metrics.jsonl"
    return [line for line in file.read_text().splitlines() if line.endswith("}")] if file.exists() else []


def kill_somewhere(line: list[str], run: Path, chance: random.Random) -> bool:
    """Up to five steps after the first one that this attempt logs, or on the way; whether a checkpoint was torn."""
    started = time.time()
    with contextlib.suppress(OSError):
        (run / "heartbeats" / "rank_0.json").unlink()
    with launch.killed(2, *line) as job:
        while not (run / "heartbeats" / "rank_0.json").exists():
            assert job.is_alive()
            time.sleep(0.02)
        goal = len(lines(run)) + chance.randrange(6)
        while len(lines(run)) < goal and job.is_alive():
            time.sleep(0.01)
        found = lines(run)
        time.sleep(chance.random() * (json.loads(found[-1])["step_seconds"] if found else 1.0))
    return any(path.stat().st_mtime > started for path in (run / "checkpoints").glob(".step_*.partial"))


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("command", ["sft", "dpo"])
def test_killed_at_random_moments(tmp_path: Path, command: str) -> None:
    assets, chance = make_assets(tmp_path), random.Random(command)
    write_rows(assets)
    rows = assets / ("train.jsonl" if command == "sft" else "pairs.jsonl")
    (assets / "few.jsonl").write_text("".join(rows.read_text().splitlines(keepends=True)[:4]))
    whole, killed = tmp_path / "whole", tmp_path / "killed"

    def line(run: Path, asynchronous: str) -> list[str]:
        found = arguments(assets, run, "bf16", f"training.steps={STEPS}", "checkpoint.every=1", "training.ema=0.9")
        found[2] = command
        found += [f"data.train={rows}", f"data.validation={assets / 'few.jsonl'}", "training.validate_every=3"]
        return [*found, "checkpoint.best=validation_loss", f"checkpoint.asynchronous={asynchronous}"]

    torn = [kill_somewhere(line(killed, "true"), killed, chance) for _ in range(KILLS)]
    done = len(lines(killed))
    launch.ranks(2, *line(killed, "true"))
    launch.ranks(2, *line(whole, "false"))
    print(f"{command}: {KILLS} kills up to step {done} of {STEPS}, {sum(torn)} while a checkpoint was written")
    assert metrics(killed) == metrics(whole)
    files = [path.relative_to(whole) for part in ("hf", "checkpoints") for path in (whole / part).rglob("*.*")]
    assert len(files) > 10
    for file in files:
        if file.name not in (".metadata", "trainer_state.json"):  # a path, a date
            assert (killed / file).read_bytes() == (whole / file).read_bytes(), file
