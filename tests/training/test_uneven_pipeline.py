"""Layers that do not divide by the pipeline: transformers' log-probs, the same files back, resuming elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DeepseekV3Config, PreTrainedConfig, Qwen3Config, Qwen3MoeConfig

from megatron_posttrain.parallel.layout import Layout, stage_layers
from tests.helpers.family_checks import assert_same_tensors, saved_tensors, tiny_model
from tests.helpers.family_configs import LATENT
from tests.helpers.launch import command, ranks
from tests.helpers.layouts import reference
from tests.helpers.models import EXPERTS, SIZES, make_assets

STEPS, ROWS = 3, 2
CASES: dict[str, tuple[PreTrainedConfig, dict[str, int]]] = {
    "dense 3|2": (Qwen3Config(**SIZES | {"num_hidden_layers": 5}), {"pipeline": 2}),
    "tied 2|1": (Qwen3Config(**SIZES | {"num_hidden_layers": 3}, tie_word_embeddings=True), {"pipeline": 2}),
    "experts 1|2|1|1": (
        Qwen3MoeConfig(**SIZES | {"num_hidden_layers": 5}, **EXPERTS),
        {"pipeline": 2, "virtual_pipeline": 2},
    ),
    "ends without layers": (
        Qwen3MoeConfig(**SIZES | {"num_hidden_layers": 2}, **EXPERTS),
        {"pipeline": 2, "virtual_pipeline": 2},
    ),
    # No expert is on the first stage.
    "dense first 3|2": (
        DeepseekV3Config(**LATENT | {"num_hidden_layers": 5, "first_k_dense_replace": 3}, q_lora_rank=20),
        {"pipeline": 2},
    ),
}


@given(st.integers(1, 64), st.integers(1, 8), st.integers(0, 200))
def test_stages_differ_by_one_layer_and_the_ends_have_the_fewer(pipeline: int, chunks: int, more: int) -> None:
    layout = Layout(pipeline=pipeline, virtual_pipeline=chunks if pipeline > 1 else None)
    count = layout.pipeline * layout.chunks
    found = stage_layers(layout, count + more)
    assert (len(found), sum(found)) == (count, count + more)
    assert max(found) - min(found) <= 1
    assert found[-1] == min(found)
    assert count < 3 or found[0] <= min(found[1:-1])
    # Interleaved: a stage's sum differs by no more either.
    sums = [sum(found[stage::pipeline]) for stage in range(pipeline)]
    assert max(sums) - min(sums) <= 1


@pytest.mark.parametrize(
    ("layers", "pipeline", "first", "middle", "last"),
    [(94, 4, 23, 24, 23), (126, 16, 7, 8, 7), (61, 16, 3, 4, 3), (126, 128, 0, 1, 0)],
)
def test_published_models(layers: int, pipeline: int, first: int, middle: int, last: int) -> None:
    found = stage_layers(Layout(pipeline=pipeline), layers)
    assert (found[0], max(found), found[-1]) == (first, middle, last)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("uneven")
    jobs = []
    for name, (config, layout) in CASES.items():
        source = root / name / "source"
        tiny_model(config, torch.float32).save_pretrained(source)
        jobs.append({"model": str(source), "layout": layout, "steps": STEPS, "rows": ROWS, "export": True})
        jobs[-1]["out"] = str(root / name)
    (root / "jobs.json").write_text(json.dumps(jobs))
    ranks(2, "-m", "tests.helpers.layouts.worker", str(root / "jobs.json"))
    return root


@pytest.mark.parametrize("name", CASES)
class TestUnevenPipeline:
    def test_logprobs_equal_transformers(self, results: Path, name: str) -> None:
        found = json.loads((results / name / "facts.json").read_text())
        expected = reference.logprobs(str(results / name / "source"))
        assert reference.largest_difference(found["packed"], expected) < 1e-4
        assert reference.largest_difference(found["alone"], expected) < 1e-4

    def test_export_is_bitwise_the_source(self, results: Path, name: str) -> None:
        assert_same_tensors(saved_tensors(results / name / "hf"), saved_tensors(results / name / "source"))

    def test_losses_and_gradient_norms_equal_transformers(self, results: Path, name: str) -> None:
        found = json.loads((results / name / "facts.json").read_text())
        losses, norms = reference.train(str(results / name / "source"), STEPS, ROWS)
        assert found["losses"] == pytest.approx(losses, rel=1e-4)
        assert found["grad_norms"] == pytest.approx(norms, rel=1e-4)


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.timeout(600)
def test_resumes_without_a_pipeline(tmp_path: Path) -> None:
    """The checkpoint's first stage has two dense layers, its second one with experts."""
    assets = make_assets(tmp_path)
    config = Qwen3MoeConfig.from_pretrained(assets / "model", num_hidden_layers=3, mlp_only_layers=[0, 1])
    tiny_model(config, torch.float32).save_pretrained(assets / "model")
    run, whole = tmp_path / "run", tmp_path / "whole"

    def arguments(output: Path, *more: str) -> list[str]:
        return [
            "sft", f"model.path={assets / 'model'}", f"data.train={assets / 'train.jsonl'}", f"output={output}",
            "precision.dtype=fp32", "data.sequence_length=64", "training.global_batch_size=4",
            "training.micro_batch_size=2", "training.steps=4", "optimizer.schedule=constant",
            "checkpoint.every=2", "logging.tensorboard=false", *more,
        ]  # fmt: skip

    ranks(2, "-m", "megatron_posttrain", *arguments(run, "parallel.pipeline=2", "training.steps=2"))
    command(*arguments(run))
    command(*arguments(whole))
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4]
    for resumed, straight in zip(metrics(run), metrics(whole), strict=True):
        assert resumed["tokens"] == straight["tokens"]
        assert resumed["loss"] == pytest.approx(straight["loss"], rel=1e-4)
        assert resumed["grad_norm"] == pytest.approx(straight["grad_norm"], rel=1e-4)
