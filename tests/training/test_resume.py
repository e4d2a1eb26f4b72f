"""A run that is killed between two steps and resumed is the run that was not killed, to the last bit."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.launch import forked, killed, ranks
from tests.helpers.models import make_assets

STEPS = 6
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
        "data.sequence_length=64", "training.global_batch_size=4", "training.micro_batch_size=2",
        f"training.steps={STEPS}", "optimizer.lr=1e-3", "optimizer.schedule=constant", "checkpoint.every=2",
        "logging.tensorboard=false", *more,
    ]  # fmt: skip


def kill_after_step(step: int, line: list[str], run: Path) -> None:
    """SIGKILL to every rank as soon as `step` is logged."""
    with killed(2, *line) as job:
        while not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_text().splitlines()) < step:
            assert job.is_alive()
            time.sleep(0.02)


@pytest.fixture(scope="module")
def whole(assets: Path) -> Path:
    """A run in fp32 that nothing disturbed."""
    ranks(2, *arguments(assets, assets / "whole", "fp32"))
    return assets / "whole"


@pytest.mark.timeout(900)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_killed_run_resumes_bitwise(assets: Path, whole: Path, tmp_path: Path, dtype: str) -> None:
    if dtype == "bf16":
        ranks(2, *arguments(assets, whole := tmp_path / "whole", dtype))
    run = tmp_path / "killed"
    kill_after_step(3, arguments(assets, run, dtype), run)
    ranks(2, *arguments(assets, run, dtype))
    assert metrics(run) == metrics(whole)
    left = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert left == ["step_000004", "step_000006"]
    for file in (whole / "hf").glob("*.safetensors"):
        assert file.read_bytes() == (run / "hf" / file.name).read_bytes()


@pytest.mark.timeout(900)
def test_resumes_under_another_layout(assets: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ranks(2, *arguments(assets, run, "fp32", "training.steps=4"))
    other = ["parallel.tensor=1", "parallel.expert=1", "parallel.pipeline=2"]
    ranks(2, *arguments(assets, run, "fp32", *other))
    for resumed, straight in zip(metrics(run), metrics(whole), strict=True):
        assert resumed["tokens"] == straight["tokens"]
        assert resumed["loss"] == pytest.approx(straight["loss"], rel=1e-4)
        assert resumed["grad_norm"] == pytest.approx(straight["grad_norm"], rel=1e-4)


def test_stop_file_saves_and_asks_to_be_run_again(assets: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    line = [*arguments(assets, run, "fp32", "training.steps=400"), "parallel.tensor=1", "parallel.expert=1"]
    with ThreadPoolExecutor() as pool:
        job = pool.submit(forked, *line, check=False)
        while not ((run / "metrics.jsonl").exists() and metrics(run)):
            assert not job.done()
            time.sleep(0.05)
        (run / ".stop").touch()
        assert job.result().returncode == 75
    (whole,) = sorted((run / "checkpoints").glob("step_*"))[-1:]
    assert int(whole.name.removeprefix("step_")) == metrics(run)[-1]["step"]
