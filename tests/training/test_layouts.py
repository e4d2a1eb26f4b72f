"""Every parallel layout says what transformers says: log-probs, losses and gradient norms, exported tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.launch import ranks
from tests.helpers.layouts import reference
from tests.helpers.models import make_qwen3

ROWS = 2
STEPS = 3  # the third depends on all that the optimizer keeps; the slow test takes ten
LAYOUTS: dict[int, dict[str, list[dict[str, int]]]] = {
    1: {"dense": [{}], "moe": [{}]},
    2: {
        "dense": [
            {"tensor": 2},
            {"tensor": 2, "sequence": False},
            {"pipeline": 2},
            {"pipeline": 2, "virtual_pipeline": 2},
            {"context": 2},
            {},
        ],
        "tied": [{"tensor": 2}, {"pipeline": 2}],
        "moe": [
            {"tensor": 2},
            {"pipeline": 2},
            {"pipeline": 2, "virtual_pipeline": 2},
            {"expert": 2},
            {"context": 2},
            {},
        ],
    },
    4: {
        "dense": [{"tensor": 2, "pipeline": 2}, {"tensor": 2, "context": 2}],
        "moe": [
            {"tensor": 2, "expert": 2, "expert_tensor": 2},
            {"tensor": 2, "pipeline": 2, "expert": 2},
            {"tensor": 2, "expert": 2},
        ],
    },
}


def name(kind: str, processes: int, layout: dict[str, Any]) -> str:
    return "-".join([kind, str(processes), *(f"{k}{v}" for k, v in layout.items())])


CASES = [(kind, processes, layout) for processes, kinds in LAYOUTS.items() for kind in kinds for layout in kinds[kind]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("models")
    return {kind: make_qwen3(directory, kind) for kind in ("dense", "tied", "moe")}


@pytest.fixture(scope="module")
def expected(models: dict[str, str]) -> dict[str, Any]:
    return {k: (reference.logprobs(path), *reference.train(path, STEPS, ROWS)) for k, path in models.items()}


@pytest.fixture(scope="module")
def facts(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(models, tmp_path_factory.mktemp("layouts"), STEPS)


def run(models: dict[str, str], out: Path, steps: int) -> dict[str, Any]:
    """One job a world size runs all its layouts: starting processes costs more than the work."""
    for processes in LAYOUTS:
        jobs = [
            {"model": models[k], "layout": lay, "steps": steps, "rows": ROWS, "export": True}
            | {"out": str(out / name(k, n, lay))}
            for k, n, lay in CASES
            if n == processes
        ]
        file = out / f"jobs{processes}.json"
        file.write_text(json.dumps(jobs))
        ranks(processes, "-m", "tests.helpers.layouts.worker", str(file))
    return {
        name(*case): json.loads((out / name(*case) / "facts.json").read_text()) | {"hf": out / name(*case) / "hf"}
        for case in CASES
    }


def check_training(found: dict[str, Any], losses: list[float], norms: list[float]) -> None:
    torch.testing.assert_close(torch.tensor(found["losses"]), torch.tensor(losses), rtol=1e-4, atol=0)
    torch.testing.assert_close(torch.tensor(found["grad_norms"]), torch.tensor(norms), rtol=1e-4, atol=0)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_ten_losses_and_gradient_norms_equal_transformers(models: dict[str, str], tmp_path: Path) -> None:
    expected = {kind: reference.train(path, 10, ROWS) for kind, path in models.items()}
    for case, found in run(models, tmp_path, 10).items():
        check_training(found, *expected[case.partition("-")[0]])


@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", CASES, ids=lambda case: name(*case))
class TestLayout:
    def test_logprobs_equal_transformers(self, case: Any, facts: Any, expected: Any) -> None:
        found = facts[name(*case)]
        assert reference.largest_difference(found["packed"], expected[case[0]][0]) < 1e-4
        assert reference.largest_difference(found["alone"], expected[case[0]][0]) < 1e-4

    def test_losses_and_gradient_norms_equal_transformers(self, case: Any, facts: Any, expected: Any) -> None:
        check_training(facts[name(*case)], *expected[case[0]][1:])

    def test_export_is_bitwise_the_source(self, case: Any, facts: Any, models: Any) -> None:
        source = load_file(Path(models[case[0]]) / "model.safetensors")
        written = {}
        for file in facts[name(*case)]["hf"].glob("*.safetensors"):
            written |= load_file(file)
        assert written.keys() == source.keys()
        assert all(torch.equal(written[n], source[n]) for n in source)
