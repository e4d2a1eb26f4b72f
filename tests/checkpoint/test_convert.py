"""Conversions there and back: every family, 1 and 4 processes, loaded by megatron-core in parallel in between."""

from __future__ import annotations

import filecmp
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_posttrain.checkpoint.compare import compare
from megatron_posttrain.checkpoint.convert import ConvertOptions, plan_hf_to_megatron, plan_megatron_to_hf
from megatron_posttrain.checkpoint.stream import StreamOptions
from tests.helpers.convert_worker import SMALL
from tests.helpers.family_checks import assert_same_tensors, saved_tensors, tiny_model
from tests.helpers.family_configs import tiny_configs
from tests.helpers.launch import ranks

CONFIGS = tiny_configs()
SAVED = ("qwen3", "qwen3-moe", "deepseek-v3")  # also saved by megatron-core itself


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All families in one job of four processes."""
    root = tmp_path_factory.mktemp("convert")
    jobs = []
    for name, config in CONFIGS.items():
        source = root / name / "source"
        tiny_model(config).save_pretrained(source)
        (source / "tokenizer.json").write_text("{}")
        moe = any(getattr(config, field, None) for field in ("num_experts", "num_local_experts", "n_routed_experts"))
        layout = {"tensor": 2, "pipeline": 2} | ({"expert": 2} if moe else {})
        job = {"model": str(source), "layout": layout, "dtype": "bf16", "save": name in SAVED}
        jobs.append(job | {"out": str(root / name)})
    (root / "jobs.json").write_text(json.dumps(jobs))
    ranks(4, "-m", "tests.helpers.convert_worker", str(root / "jobs.json"))
    return root


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_is_bitwise(results: Path, name: str) -> None:
    """One process and four write the same bytes; back in HF and in a parallel model they are the source."""
    home = results / name
    source = home / "source"
    plan_hf_to_megatron(source, SMALL).run(home / "megatron1", StreamOptions(quiet=True))
    plan_megatron_to_hf(home / "megatron1", SMALL).run(home / "hf1", StreamOptions(quiet=True))
    saved = saved_tensors(source)
    for kind in ("megatron", "hf"):
        one, four = home / f"{kind}1", home / f"{kind}4"
        names = {str(path.relative_to(one)) for path in one.rglob("*") if path.is_file()}
        assert names == {str(path.relative_to(four)) for path in four.rglob("*") if path.is_file()}
        assert all(filecmp.cmp(one / file, four / file, shallow=False) for file in names), kind
        assert len(list(one.glob("*.distcp" if kind == "megatron" else "*.safetensors"))) > 1
    assert_same_tensors(saved_tensors(home / "hf1"), saved)
    assert (home / "hf1" / "tokenizer.json").exists()
    loaded = load_file(home / "loaded.safetensors")
    assert_same_tensors(loaded, saved)
    assert all(isinstance(found, str) for found in compare(source, home / "megatron4"))
    before = json.loads((source / "config.json").read_text())
    after = json.loads((home / "hf1" / "config.json").read_text())
    changed = {key for key in before | after if before.get(key) != after.get(key)}
    assert changed <= {"num_nextn_predict_layers", "num_mtp_layers"}


@pytest.mark.parametrize("name", SAVED)
def test_distributed_checkpoint_is_what_megatron_core_writes(results: Path, name: str) -> None:
    """Keys, shapes and dtypes beside those of its own `save` of a parallel model; which converts back as well."""
    from torch.distributed.checkpoint import FileSystemReader

    home = results / name
    ours, theirs = (
        FileSystemReader(home / side).read_metadata().state_dict_metadata for side in ("megatron4", "saved")
    )
    for key, entry in theirs.items():
        if "_extra_state" in key:
            assert key in ours
        elif key not in ("embedding.word_embeddings.weight", "output_layer.weight"):  # theirs are padded
            assert (ours[key].size, ours[key].properties.dtype) == (entry.size, entry.properties.dtype), key
    back = plan_megatron_to_hf(home / "saved", ConvertOptions(source=home / "source"))
    back.run(home / "saved_hf", StreamOptions(quiet=True))
    assert_same_tensors(saved_tensors(home / "saved_hf"), saved_tensors(home / "source"))


def test_dtype_and_layout_of_experts(tmp_path: Path) -> None:
    """--dtype in both directions, and fused experts from separate ones and back."""
    model = tiny_model(CONFIGS["qwen3-moe"])
    model.save_pretrained(tmp_path / "separate", save_original_format=True)
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    options = ConvertOptions(dtype=torch.float32)
    plan_hf_to_megatron(tmp_path / "fused", options).run(tmp_path / "megatron", StreamOptions(quiet=True))
    for name, fused in (("separate", False), ("fused", True)):
        options = ConvertOptions(dtype=torch.bfloat16, fused=fused)
        target = tmp_path / f"{name}_back"
        plan_megatron_to_hf(tmp_path / "megatron", options).run(target, StreamOptions(quiet=True))
        assert_same_tensors(saved_tensors(target), saved_tensors(tmp_path / name))
    plain = plan_megatron_to_hf(tmp_path / "megatron", ConvertOptions())
    plain.run(tmp_path / "fp32", StreamOptions(quiet=True))
    assert json.loads((tmp_path / "fp32" / "config.json").read_text())["dtype"] == "float32"
    found = saved_tensors(tmp_path / "fp32")
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    assert found.keys() == saved_tensors(tmp_path / "fused").keys()
