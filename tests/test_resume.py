"""A run that is killed between two steps and resumed is the run that was not killed, to the last bit."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.launch import ROOT, ranks, torchrun
from tests.models import make_assets

STEPS = 8
VOLATILE = ("_seconds", "_memory_gib", "tokens_per_second")


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_assets(tmp_path_factory.mktemp("assets"))


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.endswith(VOLATILE)} for line in lines]


def arguments(assets: Path, output: Path, dtype: str, *more: str) -> list[str]:
    return [
        "-m", "megatron_posttrain", "sft", f"model.path={assets / 'model'}", f"data.train={assets / 'train.jsonl'}",
        f"output={output}", f"precision.dtype={dtype}", "parallel.tensor=2", "parallel.expert=2",
        "data.sequence_length=64", "training.global_batch_size=4", f"training.steps={STEPS}",
        "optimizer.lr=1e-3", "optimizer.schedule=constant", "checkpoint.every=2", "logging.tensorboard=false", *more,
    ]  # fmt: skip


def kill_after_step(step: int, line: list[str], run: Path) -> None:
    """SIGKILL to every process of the job as soon as `step` is logged."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *line]
    job = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and job.poll() is None:
        if (run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_text().splitlines()) >= step:
            break
        time.sleep(0.02)
    assert job.poll() is None, "the run ended before it could be killed"
    # The ranks too: they would outlive torchrun.
    for process in [*psutil.Process(job.pid).children(recursive=True), psutil.Process(job.pid)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    job.wait()


@pytest.mark.timeout(900)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_killed_run_resumes_bitwise(assets: Path, tmp_path: Path, dtype: str) -> None:
    torchrun(2, *arguments(assets, tmp_path / "whole", dtype))
    killed = tmp_path / "killed"
    kill_after_step(5, arguments(assets, killed, dtype), killed)
    ranks(2, *arguments(assets, killed, dtype))
    assert metrics(killed) == metrics(tmp_path / "whole")
    left = sorted(p.name for p in (killed / "checkpoints").iterdir())
    assert left == ["step_000006", "step_000008"]
    for file in (tmp_path / "whole" / "hf").glob("*.safetensors"):
        assert file.read_bytes() == (killed / "hf" / file.name).read_bytes()


@pytest.mark.timeout(900)
def test_resumes_under_another_layout(assets: Path, tmp_path: Path) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    ranks(2, *arguments(assets, run, "fp32", "training.steps=4"))
    other = ["parallel.tensor=1", "parallel.expert=1", "parallel.pipeline=2"]
    ranks(2, *arguments(assets, run, "fp32", *other))
    ranks(2, *arguments(assets, whole, "fp32"))
    for resumed, straight in zip(metrics(run), metrics(whole), strict=True):
        assert resumed["tokens"] == straight["tokens"]
        assert resumed["loss"] == pytest.approx(straight["loss"], rel=1e-4)
        assert resumed["grad_norm"] == pytest.approx(straight["grad_norm"], rel=1e-4)


def test_stop_file_saves_and_asks_to_be_run_again(assets: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    line = [*arguments(assets, run, "fp32", "training.steps=400"), "parallel.tensor=1", "parallel.expert=1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    job = subprocess.Popen([sys.executable, *line], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and not ((run / "metrics.jsonl").exists() and metrics(run)):
        time.sleep(0.05)
    (run / ".stop").touch()
    assert job.wait(timeout=60) == 75
    (whole,) = sorted((run / "checkpoints").glob("step_*"))[-1:]
    assert int(whole.name.removeprefix("step_")) == metrics(run)[-1]["step"]
