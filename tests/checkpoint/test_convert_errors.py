"""Conversions that fail or are interrupted, FP8, adapters, comparisons and what the tools print."""

from __future__ import annotations

import errno
import json
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_posttrain.checkpoint import stream
from megatron_posttrain.checkpoint.compare import Difference, compare
from megatron_posttrain.checkpoint.convert import ConvertOptions, plan_hf_to_megatron, plan_megatron_to_hf, plan_merge
from megatron_posttrain.checkpoint.hf import check_directory
from megatron_posttrain.checkpoint.hf_files import HfReader
from megatron_posttrain.checkpoint.lora import read_adapter, write_adapter
from megatron_posttrain.checkpoint.stream import StreamOptions
from megatron_posttrain.config.schema import LoraConfig
from megatron_posttrain.errors import UserError
from tests.helpers.family_checks import assert_same_tensors, saved_tensors, tiny_model
from tests.helpers.family_configs import SIZES, tiny_configs
from tests.helpers.launch import ROOT

QUIET = StreamOptions(quiet=True)
SMALL = ConvertOptions(shard_bytes=20_000)
Tool = Callable[..., tuple[int, str]]  # (name, words of the command line) -> exit status and what it said


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model") / "qwen3-moe"
    tiny_model(tiny_configs()["qwen3-moe"]).save_pretrained(directory, save_original_format=True)
    return directory


@pytest.fixture(scope="module")
def megatron(source: Path) -> Path:
    plan_hf_to_megatron(source, SMALL).run(source.parent / "megatron", QUIET)
    return source.parent / "megatron"


@pytest.fixture
def copy(source: Path, tmp_path: Path) -> Path:
    return shutil.copytree(source, tmp_path / "copy")


def fail_after(calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full after so many writes."""
    real, count = stream.write_all, iter(range(1 << 30))

    def write(*arguments: Any) -> None:
        if next(count) >= calls:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*arguments)

    monkeypatch.setattr(stream, "write_all", write)


@pytest.mark.parametrize("direction", ["to_megatron", "to_hf"])
def test_full_disk_then_resume(
    source: Path, megatron: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direction: str
) -> None:
    def plan() -> Any:
        return (
            plan_hf_to_megatron(source, SMALL) if direction == "to_megatron" else plan_megatron_to_hf(megatron, SMALL)
        )

    plan().run(tmp_path / "whole", QUIET)
    target, partial = tmp_path / "target", tmp_path / ".target.partial"
    with monkeypatch.context() as patch:
        fail_after(150 if direction == "to_megatron" else 40, patch)
        with pytest.raises(UserError, match="No space left on device; finished files are kept in"):
            plan().run(target, QUIET)
    assert not target.exists()
    assert not {".metadata", "config.json", "model.safetensors.index.json"} & {path.name for path in partial.iterdir()}
    done = {path: path.stat().st_mtime_ns for path in partial.iterdir() if path.suffix in (".distcp", ".safetensors")}
    assert 0 < len(done) < len(plan().files)
    written = plan().run(target, StreamOptions(resume=True, quiet=True))
    assert written < sum(item.nbytes for item in plan().items)
    assert all((target / path.name).stat().st_mtime_ns == mtime for path, mtime in done.items())
    for path in (tmp_path / "whole").rglob("*"):
        assert path.is_dir() or path.read_bytes() == (target / path.relative_to(tmp_path / "whole")).read_bytes()
    assert not partial.exists()


def test_resume_with_other_options_is_refused(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        fail_after(150, patch)
        with pytest.raises(UserError):
            plan_hf_to_megatron(source, SMALL).run(tmp_path / "target", QUIET)
    other = plan_hf_to_megatron(source, ConvertOptions(shard_bytes=20_000, dtype=torch.float32))
    with pytest.raises(UserError, match="was begun with other options; run without --resume"):
        other.run(tmp_path / "target", StreamOptions(resume=True, quiet=True))


def test_too_little_space_is_said_before_writing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "free_bytes", lambda directory: 10)
    with pytest.raises(UserError, match=r"the disk has 0\.00 GB free"):
        plan_hf_to_megatron(source, SMALL).run(tmp_path / "target", QUIET)
    assert list(tmp_path.iterdir()) == []


def edit(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def test_nan_is_refused_and_the_source_untouched(copy: Path, tmp_path: Path) -> None:
    name = "model.layers.2.mlp.experts.1.up_proj.weight"
    edit(copy, lambda tensors: tensors[name].view(-1).__setitem__(5, float("nan")))
    before = (copy / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="has NaN or infinite values"):
        plan_hf_to_megatron(copy, SMALL).run(tmp_path / "a", StreamOptions(check_finite=True, quiet=True))
    plan_hf_to_megatron(copy, SMALL).run(tmp_path / "a", QUIET)
    with pytest.raises(UserError, match="'" + name.replace(".", r"\.") + "' has NaN"):
        plan_megatron_to_hf(tmp_path / "a", SMALL).run(tmp_path / "b", StreamOptions(check_finite=True, quiet=True))
    assert not (tmp_path / "b").exists()
    assert (copy / "model.safetensors").read_bytes() == before


def test_damaged_checkpoints(copy: Path, megatron: Path, tmp_path: Path) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="truncated: tensor"):
        plan_hf_to_megatron(copy, SMALL)
    damaged = shutil.copytree(megatron, tmp_path / "megatron")
    file = damaged / "__1_0.distcp"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"__1_0\.distcp: truncated"):
        plan_megatron_to_hf(damaged, SMALL)
    file.unlink()
    with pytest.raises(UserError, match=r"__1_0\.distcp: no such file"):
        plan_megatron_to_hf(damaged, SMALL)
    (damaged / ".metadata").unlink()
    with pytest.raises(UserError, match="not a Megatron distributed checkpoint"):
        plan_megatron_to_hf(damaged, SMALL)


# ---- compare ---------------------------------------------------------------------------------------------


@pytest.fixture
def tool(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Tool:
    def run(name: str, *words: Any) -> tuple[int, str]:
        path = ROOT / "tools" / f"{name}.py"
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(path), run_name="__main__")
        said = capsys.readouterr()
        assert isinstance(caught.value.code, int)
        return caught.value.code, said.out + said.err

    return run


def test_custom_code_is_left_behind_unless_asked_for(copy: Path, tmp_path: Path, tool: Tool) -> None:
    (copy / "modeling_custom.py").write_text("raise SystemExit('was run')\n")
    config = json.loads((copy / "config.json").read_text()) | {"auto_map": {"AutoModel": "modeling_custom.Model"}}
    (copy / "config.json").write_text(json.dumps(config))
    for asked, there in ((["--custom-code"], True), ([], False)):
        megatron, hf = tmp_path / f"megatron-{there}", tmp_path / f"hf-{there}"
        for script, words in (
            ("convert_hf_to_megatron", ["--hf", copy, "--megatron", megatron]),
            ("convert_megatron_to_hf", ["--megatron", megatron, "--hf", hf, "--source", copy]),
        ):
            status, said = tool(script, *words, "--quiet", *asked)
            assert status == 0
            assert ("modeling_custom.py: custom code, left behind (--custom-code carries it)" in said) is not there
        assert (hf / "modeling_custom.py").exists() is there
        assert ("auto_map" in json.loads((hf / "config.json").read_text())) is there


def differences(a: Path, b: Path, tolerance: float | None = None) -> list[tuple[str, str]]:
    return [(found.kind, found.name) for found in compare(a, b, tolerance) if isinstance(found, Difference)]


def test_compare(source: Path, megatron: Path, copy: Path, tmp_path: Path) -> None:
    name, gone = "model.layers.0.mlp.experts.3.down_proj.weight", "model.layers.1.mlp.up_proj.weight"
    edit(copy, lambda tensors: tensors[name].view(-1)[7].add_(0.25))
    plan_hf_to_megatron(copy, SMALL).run(tmp_path / "megatron", QUIET)
    assert differences(source, megatron) == differences(megatron, source) == []
    key = "decoder.layers.0.mlp.experts.experts.linear_fc2.weight"
    for a, b, where in ((source, copy, name), (megatron, tmp_path / "megatron", key), (megatron, copy, name)):
        assert differences(a, b) == [("values", where)]
        assert differences(a, b, 0.1) == [("values", where)]
        assert differences(a, b, 0.3) == []
    edit(copy, lambda tensors: tensors.pop(gone))
    assert ("missing in B", gone) in differences(source, copy)
    assert ("missing in A", gone) in differences(copy, megatron)
    edit(copy, lambda tensors: tensors.__setitem__(gone, torch.zeros(2, 3)))
    assert ("shape", gone) in differences(source, copy)
    edit(copy, lambda tensors: tensors.__setitem__("model.norm.weight", tensors["model.norm.weight"].float()))
    assert ("dtype", "model.norm.weight") in differences(source, copy)
    assert ("dtype", "model.norm.weight") not in differences(source, copy, 0.0)


def test_exit_statuses_of_compare(source: Path, megatron: Path, copy: Path, tool: Tool) -> None:
    assert tool("compare_checkpoints", source, megatron) == (0, "77 equal, 0 different\n")
    edit(copy, lambda tensors: tensors["model.norm.weight"].zero_())
    status, said = tool("compare_checkpoints", megatron, copy)
    assert status == 1
    assert "model.norm.weight" in said
    assert "76 equal, 1 different" in said
    assert tool("compare_checkpoints", source, source / "nowhere")[0] == 2


# ---- FP8 -------------------------------------------------------------------------------------------------


def dequantised(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The published formula, element by element, in float64."""
    result = {}
    for name, tensor in tensors.items():
        if name.endswith("_scale_inv"):
            continue
        if tensor.dtype == torch.float8_e4m3fn:
            scale = tensors[name + "_scale_inv"].double()
            whole = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: tensor.shape[0], : tensor.shape[1]]
            tensor = (tensor.double() * whole).bfloat16()
        result[name] = tensor
    return result


def test_fp8_out_and_in(tmp_path: Path) -> None:
    """Sizes that are no multiples of a block, and several blocks; errors within e4m3's half step of 1/16."""
    config = tiny_configs()["deepseek-v3"].__class__(
        **tiny_configs()["deepseek-v3"].to_dict() | {"hidden_size": 200, "intermediate_size": 300}
    )
    tiny_model(config).save_pretrained(tmp_path / "plain", save_original_format=True)
    plan_hf_to_megatron(tmp_path / "plain", SMALL).run(tmp_path / "megatron", QUIET)
    plan_megatron_to_hf(tmp_path / "megatron", ConvertOptions(quantize=True)).run(tmp_path / "fp8", QUIET)
    plain, stored = saved_tensors(tmp_path / "plain"), saved_tensors(tmp_path / "fp8")
    scaled = {name.removesuffix("_scale_inv") for name in stored if name.endswith("_scale_inv")}
    assert "model.layers.1.mlp.experts.7.down_proj.weight" in scaled
    assert not {"model.embed_tokens.weight", "model.layers.1.mlp.gate.weight", "lm_head.weight"} & scaled
    assert json.loads((tmp_path / "fp8" / "config.json").read_text())["quantization_config"]["quant_method"] == "fp8"
    expected = dequantised(stored)
    for name, tensor in plain.items():
        if name not in scaled:
            assert torch.equal(stored[name], tensor)
            continue
        scale = stored[name + "_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
        step = scale[: tensor.shape[0], : tensor.shape[1]] * 2**-9
        error = (expected[name].float() - tensor.float()).abs()
        assert (error <= tensor.float().abs() * (1 / 16 + 1 / 128) + step).all(), name

    check_directory(tmp_path / "fp8")
    plan_hf_to_megatron(tmp_path / "fp8", SMALL).run(tmp_path / "again", QUIET)
    plan_megatron_to_hf(tmp_path / "again", SMALL).run(tmp_path / "bf16", QUIET)
    assert_same_tensors(saved_tensors(tmp_path / "bf16"), expected)
    assert "quantization_config" not in json.loads((tmp_path / "bf16" / "config.json").read_text())
    assert differences(tmp_path / "fp8", tmp_path / "again") == []
    edit(tmp_path / "fp8", lambda tensors: tensors.pop(sorted(scaled)[0] + "_scale_inv"))
    with pytest.raises(UserError, match=r"missing tensor .*_scale_inv"):
        check_directory(tmp_path / "fp8")


# ---- LoRA ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapter_is_merged_as_peft_merges_it(tmp_path: Path, dtype: torch.dtype) -> None:
    peft = pytest.importorskip("peft")
    config = tiny_configs()["qwen3"]
    tiny_model(config, dtype).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="auto")
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    options |= {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 32}}
    model = peft.get_peft_model(base, peft.LoraConfig(**options, task_type="CAUSAL_LM", init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    plan_hf_to_megatron(tmp_path / "base", SMALL).run(tmp_path / "megatron", QUIET)
    merging = ConvertOptions(adapter=tmp_path / "adapter")
    plan_megatron_to_hf(tmp_path / "megatron", merging).run(tmp_path / "merged", QUIET)
    # PEFT rounds the change before it is added; ours is rounded once, so that both are the same in fp32
    model.float().merge_and_unload().to(dtype).save_pretrained(tmp_path / "expected")
    expected = saved_tensors(tmp_path / "expected")
    assert_same_tensors(saved_tensors(tmp_path / "merged"), expected)
    plan_merge(tmp_path / "base", merging).run(tmp_path / "directly", QUIET)
    assert_same_tensors(saved_tensors(tmp_path / "directly"), expected)
    assert differences(tmp_path / "base", tmp_path / "merged")


def test_adapter_written_for_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    tiny_model(tiny_configs()["qwen3"], torch.float32).save_pretrained(tmp_path / "base")
    heads = SIZES["num_attention_heads"] * 16
    module = "model.layers.2.self_attn.q_proj"
    a, b = torch.randn(3, SIZES["hidden_size"]), torch.randn(heads, 3)
    write_adapter(tmp_path / "adapter", [(module, a, b, None)], LoraConfig(rank=3, alpha=6.0))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="auto")
    weight = base.state_dict()[f"{module}.weight"].clone()
    merged = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    torch.testing.assert_close(merged.state_dict()[f"{module}.weight"], weight + 2.0 * b @ a)
    found = read_adapter(tmp_path / "adapter")
    assert torch.equal(found.merge(module, weight), merged.state_dict()[f"{module}.weight"])
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(UserError, match="q_proj' has A, B only; its adapter has A, B, M"):
        read_adapter(tmp_path / "adapter")


# ---- the tools -------------------------------------------------------------------------------------------

LARGE = {
    "qwen3_moe": {
        "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "moe_intermediate_size": 1536,
        "num_hidden_layers": 94, "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128,
        "num_experts": 128, "num_experts_per_tok": 8, "max_position_embeddings": 40960,
    },
    "deepseek_v3": {
        "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
        "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128, "n_routed_experts": 256,
        "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "first_k_dense_replace": 3,
        "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "max_position_embeddings": 163840, "num_nextn_predict_layers": 1,
        "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # 235.09 G parameters in bf16; 94 layers x (2 norms, qkv, proj, 2 head norms, router, 2 x 128) + 3
        ("qwen3_moe", ["235.094 G", "24725 of Megatron", "470.2", "largest tensor    1.245 GB"]),
        # 671 G on the card, and the MTP layer's 11.5 G beside shared embeddings and head
        ("deepseek_v3", ["682.", "largest tensor    1.853 GB", "NOT enough"]),
    ],
)
def test_dry_run_from_config_alone(tmp_path: Path, kind: str, expected: list[str], tool: Tool) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind} | LARGE[kind]))
    words = ["--hf", tmp_path, "--megatron", tmp_path / "out", "--dry-run"]
    status, said = tool("convert_hf_to_megatron", *words)
    assert status == 0, said
    assert all(text in said for text in expected), said
    assert not (tmp_path / "out").exists()


def test_exit_statuses(source: Path, megatron: Path, tmp_path: Path, tool: Tool) -> None:
    words = ["--megatron", megatron, "--hf", tmp_path / "hf", "--shard-size", "50KB"]
    assert tool("convert_megatron_to_hf", *words)[0] == 0
    status, said = tool("convert_megatron_to_hf", *words)
    assert status == 2
    assert "exists and is not empty (--overwrite replaces it)" in said
    assert HfReader(tmp_path / "hf").names() == HfReader(source).names()
    assert max(path.stat().st_size for path in (tmp_path / "hf").glob("*.safetensors")) < 60_000
