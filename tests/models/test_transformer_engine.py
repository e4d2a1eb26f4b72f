"""Transformer Engine's layers on CPU (see tests/te): training, context parallelism, FP8 recipes, resuming.

Families: test_families_layouts.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.family_checks import tiny_model
from tests.helpers.family_configs import tiny_configs
from tests.helpers.launch import execute, ranks, torchrun
from tests.helpers.layouts import reference
from tests.helpers.models import make_assets, make_qwen3
from tests.te import needs_transformer_engine
from tests.training.test_resume import arguments, metrics

pytestmark = [needs_transformer_engine, pytest.mark.timeout(900)]

STEPS = 2
LAYERS = 2
SPLIT = {"dense": {"tensor": 2, "sequence": False}, "moe": {"tensor": 2, "expert": 2}}
RECIPES = ("delayed", "tensorwise", "blockwise")
BF16 = {"dtype": "bf16"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("models")
    found = {kind: make_qwen3(directory, kind, LAYERS) for kind in SPLIT}
    found["mla"] = str(directory / "mla")
    tiny_model(tiny_configs()["deepseek-v3"], torch.float32).save_pretrained(found["mla"])
    return found


@pytest.fixture(scope="module")
def facts(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One job of two processes."""
    out = tmp_path_factory.mktemp("out")
    jobs: dict[str, dict[str, Any]] = {}
    for kind, split in SPLIT.items():
        jobs[f"{kind} fp32"] = {"model": models[kind], "layout": split}
        jobs[f"{kind} bf16"] = {"model": models[kind], "layout": split, "precision": BF16, "rows": 8}
    for recipe in RECIPES:
        jobs[recipe] = jobs["moe bf16"] | {"precision": BF16 | {"fp8": recipe}}
    # Sequence parallelism gathers blocks of 128; this model is 64 wide. Resuming has a wider one.
    jobs["blockwise"]["layout"] = {"expert": 2}
    jobs["ends"] = jobs["moe bf16"] | {"precision": BF16 | {"fp8": "tensorwise", "bf16_ends": 1}}
    jobs["context"] = jobs["dense bf16"] | {"layout": {"context": 2}}
    jobs["unmended"] = {"model": models["mla"], "layout": {"tensor": 2}, "without": "count_down_projections_once"}
    for name, job in jobs.items():
        job |= {"steps": 1 if name == "unmended" else STEPS, "score": False, "out": str(out / name)}
        job["model_options"] = {"implementation": "transformer_engine"}
    (out / "jobs.json").write_text(json.dumps(list(jobs.values())))
    ranks(2, "-m", "tests.helpers.layouts.worker", str(out / "jobs.json"), te=True)
    return {name: json.loads((out / name / "facts.json").read_text()) for name in jobs}


@pytest.mark.parametrize("kind", SPLIT)
def test_trains_as_transformers_does(facts: dict[str, Any], models: dict[str, str], kind: str) -> None:
    """With Transformer Engine's optimizer, and weight gradients that its layers add to the main gradients."""
    losses, norms = reference.train(models[kind], STEPS)
    assert facts[f"{kind} fp32"]["losses"] == pytest.approx(losses, rel=1e-4)
    assert facts[f"{kind} fp32"]["grad_norms"] == pytest.approx(norms, rel=1e-4)


def test_context_parallelism_changes_nothing_but_rounding(facts: dict[str, Any]) -> None:
    assert facts["context"]["losses"] == pytest.approx(facts["dense bf16"]["losses"], rel=1e-3)
    assert facts["context"]["grad_norms"] == pytest.approx(facts["dense bf16"]["grad_norms"], rel=1e-2)


@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_losses_are_near_bf16(facts: dict[str, Any], recipe: str) -> None:
    found, expected = facts[recipe], facts["moe bf16"]
    assert found["losses"] != expected["losses"]
    assert found["losses"] == pytest.approx(expected["losses"], rel=0.03)
    assert found["grad_norms"] == pytest.approx(expected["grad_norms"], rel=0.15)


def test_all_layers_in_bf16_is_bf16(facts: dict[str, Any]) -> None:
    """The layer at either end of two; sums have other orders, for rows are padded."""
    found, expected = facts["ends"], facts["moe bf16"]
    assert found["losses"][0] == pytest.approx(expected["losses"][0], rel=1e-5)
    assert found["grad_norms"][0] == pytest.approx(expected["grad_norms"][0], rel=1e-3)


def test_down_projections_count_twice_without_their_fix(facts: dict[str, Any], models: dict[str, str]) -> None:
    losses, norms = reference.train(models["mla"], 1)
    assert facts["unmended"]["losses"] == pytest.approx(losses, rel=1e-5)
    assert facts["unmended"]["grad_norms"][0] > norms[0] * 1.01


@pytest.mark.slow
@pytest.mark.parametrize("fp8", ["null", *RECIPES])
def test_resumes_bitwise(tmp_path: Path, fp8: str) -> None:
    """Amax histories and the optimizer's state included."""
    assets = make_assets(tmp_path)
    for run, more in (("whole", []), ("parts", ["training.steps=4"]), ("parts", [])):
        line = arguments(assets, tmp_path / run, "bf16", f"precision.fp8={fp8}", *more)
        torchrun(2, "-m", "tests.te", *line[1:])
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    for file in (tmp_path / "whole" / "hf").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "parts" / "hf" / file.name).read_bytes()


@pytest.mark.slow
def test_gpu_check_toy_runs(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "tests.te", "tools.gpu_check", "--toy", "--output", str(tmp_path / "results.json")]
    execute(line, check=True, timeout=280)
    found = json.loads((tmp_path / "results.json").read_text())["results"]
    passed = {r["name"] for r in found if r["status"] == "passed"}
    assert {"layers, transformer_engine, Qwen3-30B-A3B", "training, fp8 blockwise against bf16"} <= passed
    assert {r["status"] for r in found} == {"passed", "skipped"}


@pytest.mark.slow
@pytest.mark.parametrize("fp8", ["null", "tensorwise"])
def test_grpo_with_vllm_in_every_rank(tmp_path: Path, fp8: str) -> None:
    assets = make_assets(tmp_path)
    line = [
        "megatron_posttrain", "grpo", f"model.path={assets / 'model'}", f"data.train={assets / 'rl.jsonl'}",
        f"output={tmp_path / 'run'}", "parallel.tensor=2", "parallel.expert=2", "data.sequence_length=64",
        "rollout.prompts_per_step=4", "rollout.samples_per_prompt=4", "rollout.max_tokens=16", "training.steps=2",
        "training.global_batch_size=16", "training.micro_batch_size=4", f"precision.fp8={fp8}",
        f"precision.dtype={'fp32' if fp8 == 'null' else 'bf16'}", "rewards=[{name: math, weight: 1.0}]",
    ]  # fmt: skip
    torchrun(2, "-m", "tests.te", *line)
    for record in metrics(tmp_path / "run"):
        assert record["logprob_difference"] < (1e-4 if fp8 == "null" else 0.2)
