"""A new algorithm is one file and a row of the table: it trains under a layout, resumes, exports, explains itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.launch import ranks
from tests.helpers.models import make_assets

TIMES = ("_seconds", "per_second", "_memory_gib")


def lines(run: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if not k.endswith(TIMES)} for record in found]


@pytest.mark.timeout(900)
def test_it_trains_resumes_and_exports(tmp_path: Path) -> None:
    assets, run = make_assets(tmp_path), tmp_path / "run"
    words = [
        "-m", "tests.helpers.toy_algorithm", "toy",
        f"model.path={assets / 'model'}", f"data.train={assets / 'train.jsonl'}",
        "data.sequence_length=64", "precision.dtype=fp32", "training.steps=3", "training.global_batch_size=4",
        "training.micro_batch_size=2",
        "optimizer.lr=1e-3", "checkpoint.every=1", "logging.tensorboard=false", "algorithm.power=1.0",
    ]  # fmt: skip
    ranks(4, *words, f"output={run}", "parallel.tensor=2", "parallel.pipeline=2", "parallel.expert=2")
    metrics = lines(run)
    assert [m["step"] for m in metrics] == [1, 2, 3]
    assert all(0 < m["probability"] < 1 for m in metrics)
    weights = [file.read_bytes() for file in sorted((run / "hf").glob("*.safetensors"))]
    shutil.rmtree(run / "checkpoints" / "step_000003")
    shutil.rmtree(run / "hf")
    ranks(4, *words, f"output={run}", "parallel.tensor=2", "parallel.pipeline=2", "parallel.expert=2")
    assert lines(run) == metrics
    assert [file.read_bytes() for file in sorted((run / "hf").glob("*.safetensors"))] == weights
    ranks(1, *words, f"output={tmp_path / 'alone'}")
    for alone, split in zip(lines(tmp_path / "alone"), metrics, strict=True):
        assert split["loss"] == pytest.approx(alone["loss"], rel=1e-4)
        assert split["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-4)
    refused = ranks(1, *words, f"output={run}", "algorithm.pover=2", check=False)
    assert refused.returncode == 2
    assert "did you mean 'algorithm.power'" in refused.stderr or "did you mean 'power'" in refused.stderr
