"""Every family under tensor x pipeline x expert parallelism: transformers' log-probs, loss and gradient norm, and
bitwise the same directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.family_checks import assert_same_tensors, saved_tensors, tiny_model
from tests.family_configs import tiny_configs
from tests.launch import torchrun
from tests.layouts import reference

CONFIGS = tiny_configs()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All families in one job of four processes."""
    root = tmp_path_factory.mktemp("families")
    jobs = []
    for name, config in CONFIGS.items():
        source = root / name / "source"
        tiny_model(config, torch.float32).save_pretrained(source)
        moe = any(getattr(config, field, None) for field in ("num_experts", "num_local_experts"))
        layout = {"tensor": 2, "pipeline": 2} | ({"expert": 2} if moe else {})
        jobs.append({"model": str(source), "layout": layout, "steps": 1, "export": True, "out": str(root / name)})
    (root / "jobs.json").write_text(json.dumps(jobs))
    torchrun(4, "-m", "tests.layouts.worker", str(root / "jobs.json"))
    return root


@pytest.mark.parametrize("name", CONFIGS)
def test_logprobs_gradients_and_round_trip(results: Path, name: str) -> None:
    facts = json.loads((results / name / "facts.json").read_text())
    expected = reference.logprobs(str(results / name / "source"))
    for key in ("alone", "packed"):
        for found, wanted in zip(facts[key], expected, strict=True):
            torch.testing.assert_close(torch.tensor(found), wanted, atol=1e-4, rtol=0)
    assert_same_tensors(saved_tensors(results / name / "hf"), saved_tensors(results / name / "source"))
    losses, norms = reference.train(str(results / name / "source"), 1)
    assert facts["losses"] == pytest.approx(losses, rel=1e-5)
    assert facts["grad_norms"] == pytest.approx(norms, rel=1e-5)
