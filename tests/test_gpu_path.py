"""The GPU path as far as it goes without a GPU: imports, options, example layouts, tools/gpu_check.py."""

from __future__ import annotations

import dataclasses
import importlib
import json
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import megatron_posttrain
from benchmarks import gpu_check
from megatron_posttrain.cli.main import main
from megatron_posttrain.config.schema import ModelConfig, PrecisionConfig
from megatron_posttrain.errors import UserError
from megatron_posttrain.models import build
from megatron_posttrain.models.build import config_options
from megatron_posttrain.models.modules import kernels
from megatron_posttrain.parallel.layout import Layout
from megatron_posttrain.planning.known_models import KNOWN_MODELS
from megatron_posttrain.platform.cuda import CudaPlatform, fp8_recipes
from tests.helpers.launch import EXAMPLES, ROOT, forked, ranks

# Where the path is an earlier stage's output, or the quickstart's own small model
MODELS = dict.fromkeys(("grpo.yaml", "dapo.yaml", "ppo.yaml"), "Qwen3-8B") | {
    "qwen3_30b_a3b_grpo.yaml": "Qwen3-30B-A3B"
}
RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")


class TransformerEngineEverywhere(CudaPlatform):
    """A machine with a GPU and Transformer Engine, as far as options go."""

    def has_transformer_engine(self) -> bool:
        return True


@pytest.fixture
def transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    platform = TransformerEngineEverywhere()
    monkeypatch.setattr(build, "platform", lambda: platform)
    monkeypatch.setattr(kernels, "platform", lambda: platform)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *a: (9, 0))


def test_all_modules_import() -> None:
    found = pkgutil.walk_packages(megatron_posttrain.__path__, "megatron_posttrain.")
    wanted = [m.name for m in found if any(room in m.name for room in ("platform", "models"))]
    wanted += [m.name for m in pkgutil.walk_packages(gpu_check.__path__, "benchmarks.gpu_check.")]
    assert "megatron_posttrain.platform.cuda" in wanted
    for name in wanted:
        importlib.import_module(name)


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda f: str(f.relative_to(ROOT / "examples")))
def test_example_passes_doctor_on_its_nodes(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = str(file.relative_to(ROOT / "examples"))
    model = ["--model", MODELS[name]] if name in MODELS else []
    cluster = "16xH100" if "two nodes" in file.read_text() else "8xH100"
    assert main(["doctor", "--config", str(file), "--assume", cluster, *model]) == 0
    said = capsys.readouterr().out
    assert re.search(r"ok +layout", said)
    assert re.search(r"ok +memory", said) or name.startswith("quickstart/")


@pytest.mark.parametrize(
    ("gpus", "model", "more", "said"),
    [
        ("8xH100", "Qwen3-30B-A3B", ["precision.fp8=mxfp8"], r"mxfp8 does not run on compute capability 9\.0"),
        ("8xB200", "Qwen3-30B-A3B", ["precision.fp8=blockwise"], r"allowed: delayed, tensorwise, mxfp8, null"),
        ("8xA100", "Qwen3-30B-A3B", ["precision.fp8=delayed"], r"allowed: null"),
        ("8xH100", "gpt-oss-20b", ["precision.fp8=blockwise", "parallel.expert_tensor=1"], r"this model is 2880 wide"),
        ("8xH100", "Qwen3-30B-A3B", ["precision.bf16_ends=1"], r"bf16_ends: 1 needs precision\.fp8"),
    ],
)
def test_doctor_refuses_fp8_that_the_gpu_has_not(
    capsys: pytest.CaptureFixture[str], gpus: str, model: str, more: list[str], said: str
) -> None:
    config = str(ROOT / "examples" / "qwen3_30b_a3b_sft.yaml")
    assert main(["doctor", "--config", config, "--assume", gpus, "--model", model, *more]) != 0
    assert re.search(said, re.sub(r"\s+", " ", capsys.readouterr().out))


def options(name: str, fp8: str | None = None, implementation: str = "auto", dtype: str = "bf16") -> dict[str, Any]:
    precision = PrecisionConfig.model_validate({"dtype": dtype, "fp8": fp8})
    model = ModelConfig.model_validate({"path": "none", "implementation": implementation})
    return config_options(KNOWN_MODELS[name], Layout(), model, precision)


@pytest.mark.usefixtures("transformer_engine")
class TestTransformerEngineOptions:
    @pytest.mark.parametrize("name", KNOWN_MODELS)
    def test_megatron_core_knows_every_option(self, name: str) -> None:
        from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

        config = TransformerConfig if KNOWN_MODELS[name].mla is None else MLATransformerConfig
        assert options(name, "delayed").keys() <= {f.name for f in dataclasses.fields(config)}

    def test_recipes(self) -> None:
        found = {recipe: options("Qwen3-8B", recipe) for recipe in RECIPES[:3]}
        assert {r: (o["fp8"], o["fp8_recipe"]) for r, o in found.items()} == {
            "delayed": ("hybrid", "delayed"),
            "tensorwise": ("hybrid", "tensorwise"),
            "blockwise": ("e4m3", "blockwise"),
        }
        with pytest.raises(UserError, match=r"mxfp8 does not run on compute capability 9\.0; allowed: .*blockwise"):
            options("Qwen3-8B", "mxfp8")
        with pytest.raises(UserError, match=r"needs precision\.dtype bf16, found fp32"):
            options("Qwen3-8B", "delayed", dtype="fp32")

    def test_ends_in_bf16(self) -> None:
        def ends(recipe: str) -> dict[str, Any]:
            precision = PrecisionConfig.model_validate({"fp8": recipe, "bf16_ends": 2})
            return config_options(KNOWN_MODELS["Qwen3-8B"], Layout(), ModelConfig(path="none"), precision)

        found = ends("tensorwise")
        names = ("first_last_layers_bf16", "num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16")
        assert [found[name] for name in names] == [True, 2, 2]
        with pytest.raises(UserError, match=r"precision\.bf16_ends: .* none for the delayed recipe"):
            ends("delayed")

    def test_deepep(self, monkeypatch: pytest.MonkeyPatch) -> None:
        moe = ModelConfig.model_validate({"path": "none", "moe": {"dispatcher": "deepep"}})
        of = (KNOWN_MODELS["Qwen3-30B-A3B"], Layout(8, expert=8), moe, PrecisionConfig())
        with pytest.raises(UserError, match="deepep needs CUDA and the package deep_ep; allowed here: alltoall"):
            config_options(*of)
        monkeypatch.setattr(CudaPlatform, "has_deepep", lambda self: True)
        found = config_options(*of)
        assert (found["moe_token_dispatcher_type"], found["moe_flex_dispatcher_backend"]) == ("flex", "deepep")

    def test_fused_rope_only_where_it_keeps_yarn(self) -> None:
        """Its kernel for packed rows drops the factor on cosine and sine."""
        names = ("Qwen3-8B", "gpt-oss-20b", "DeepSeek-V3")
        assert [options(n)["apply_rope_fusion"] for n in names] == [True, False, False]

    def test_router_stays_in_fp32(self) -> None:
        found = options("Qwen3-30B-A3B", "tensorwise")
        assert found["moe_router_dtype"] == "fp32"
        assert found["moe_grouped_gemm"]
        assert found["moe_permute_fusion"]


def test_fp8_and_transformer_engine_are_refused_without_it() -> None:
    with pytest.raises(UserError, match=r"precision.fp8: delayed needs Transformer Engine"):
        options("Qwen3-8B", "delayed")
    with pytest.raises(UserError, match="implementation=transformer_engine, but Transformer Engine is not installed"):
        options("Qwen3-8B", implementation="transformer_engine")


def test_bf16_ends_are_refused_without_fp8() -> None:
    with pytest.raises(UserError, match=r"precision.bf16_ends: 1 needs precision.fp8"):
        config_options(
            KNOWN_MODELS["Qwen3-8B"], Layout(), ModelConfig(path="none"), PrecisionConfig(dtype="bf16", bf16_ends=1)
        )


def test_recipes_by_gpu() -> None:
    assert fp8_recipes((8, 0)) == ()
    assert "blockwise" in fp8_recipes((9, 0))
    assert "mxfp8" in fp8_recipes((10, 0))


def test_varlen_attention_is_what_the_kernel_check_expects() -> None:
    """On CPU it is not used, but this torch has it with the arguments that PackedAttention gives."""
    assert kernels.torch_has_varlen()
    assert not kernels.varlen_attention(torch.bfloat16, 128)
    assert not kernels.grouped_matmul(torch.bfloat16)


def run_gpu_check(*arguments: str, status: int = 0) -> str:
    done = forked("tools/gpu_check.py", *arguments, check=False, timeout=280)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_check_without_gpu_skips_with_reasons(tmp_path: Path) -> None:
    run_gpu_check("--output", str(tmp_path / "results.json"))
    found = json.loads((tmp_path / "results.json").read_text())
    assert len(found["results"]) > 30
    assert {r["status"] for r in found["results"]} == {"skipped"}
    assert all("no CUDA device" in r["reason"] for r in found["results"])


def test_gpu_check_toy_runs(tmp_path: Path) -> None:
    said = run_gpu_check("--toy", "--output", str(tmp_path / "results.json"))
    assert "say nothing about speed" in said
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["machine"]["toy"]
    status = {r["name"]: r["status"] for r in found["results"]}
    for name in (
        "attention kernel",
        "grouped experts kernel",
        "layers, torch, Qwen3-30B-A3B",
        "peaks",
        "optimizer step",
    ):
        assert status[name] == "passed"
    assert all(r["reason"] for r in found["results"] if r["status"] == "skipped")


def test_gpu_check_of_several_ranks(tmp_path: Path) -> None:
    ranks(2, "tools/gpu_check.py", "--toy", "--output", str(tmp_path / "results.json"))
    status = {r["name"]: r["status"] for r in json.loads((tmp_path / "results.json").read_text())["results"]}
    assert set(status.values()) == {"passed", "skipped"}
    assert [name for name, s in status.items() if s == "skipped"] == [
        "ranks: layout tensor=2 pipeline=2 expert=2", "ranks: layout tensor=2 context=2 expert=4",
        "ranks: layout expert=8",
    ]  # fmt: skip


def test_gpu_check_refuses_unknown_items() -> None:
    assert "--only peeks: no item has this in its name; did you mean 'peaks'" in run_gpu_check(
        "--only", "platform,peeks", status=2
    )
