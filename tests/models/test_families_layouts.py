"""Every family under tensor x pipeline x expert parallelism: transformers' log-probs, loss and gradient norm, and
bitwise the same directory. With torch's layers as on CPU and as on CUDA, and with Transformer Engine's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.family_checks import assert_same_tensors, saved_tensors, tiny_model
from tests.helpers.family_configs import tiny_configs
from tests.helpers.launch import ranks
from tests.helpers.layouts import reference
from tests.te import needs_transformer_engine

CONFIGS = tiny_configs()
WORKER = "tests.helpers.layouts.worker"
ROWS = 2
LAYERS: dict[str, dict[str, Any]] = {
    "cpu": {},
    "cuda": {"grouped": True, "fused": True},
    "te": {"model_options": {"implementation": "transformer_engine"}},
}


def jobs(root: Path, layers: str) -> list[dict[str, Any]]:
    found = []
    for name, config in CONFIGS.items():
        moe = any(getattr(config, f, None) for f in ("num_experts", "num_local_experts", "n_routed_experts"))
        layout = {"tensor": 2, "pipeline": 2} | ({"expert": 2} if moe else {})
        out = {"out": str(root / name / layers), "model": str(root / name / "source")}
        found.append(out | {"layout": layout, "steps": 1, "rows": ROWS, "export": True} | LAYERS[layers])
    return found


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("families")
    for name, config in CONFIGS.items():
        tiny_model(config, torch.float32).save_pretrained(root / name / "source")
    return root


@pytest.fixture(scope="module")
def torch_layers(sources: Path) -> None:
    """All families in one job of four processes."""
    (sources / "torch.json").write_text(json.dumps(jobs(sources, "cpu") + jobs(sources, "cuda")))
    ranks(4, "-m", WORKER, str(sources / "torch.json"))


@pytest.fixture(scope="module")
def te_layers(sources: Path) -> None:
    (sources / "te.json").write_text(json.dumps(jobs(sources, "te")))
    ranks(4, "-m", WORKER, str(sources / "te.json"), te=True)


def check(sources: Path, name: str, layers: str) -> None:
    source, out = sources / name / "source", sources / name / layers
    facts = json.loads((out / "facts.json").read_text())
    expected = reference.logprobs(str(source))
    for key in ("alone", "packed"):
        for found, wanted in zip(facts[key], expected, strict=True):
            torch.testing.assert_close(torch.tensor(found), wanted, atol=1e-4, rtol=0)
    assert_same_tensors(saved_tensors(out / "hf"), saved_tensors(source))
    losses, norms = reference.train(str(source), 1, ROWS)
    assert facts["losses"] == pytest.approx(losses, rel=1e-5)
    assert facts["grad_norms"] == pytest.approx(norms, rel=1e-5)


@pytest.mark.usefixtures("torch_layers")
@pytest.mark.parametrize("layers", ["cpu", "cuda"])
@pytest.mark.parametrize("name", CONFIGS)
def test_torch_layers(sources: Path, name: str, layers: str) -> None:
    check(sources, name, layers)


@needs_transformer_engine
@pytest.mark.usefixtures("te_layers")
@pytest.mark.parametrize("name", CONFIGS)
def test_transformer_engine_layers(sources: Path, name: str) -> None:
    check(sources, name, "te")
