"""A directory is the model that transformers reads from it, or it is refused; nothing of it is lost in silence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from megatron_posttrain.checkpoint.compare import compare
from megatron_posttrain.checkpoint.convert import ConvertOptions, plan_hf_to_megatron
from megatron_posttrain.checkpoint.hf import check_directory, model_directory
from megatron_posttrain.checkpoint.hf_files import HfWriter, carry_side_files, read_json
from megatron_posttrain.checkpoint.stream import StreamOptions
from megatron_posttrain.errors import NotFiniteError, UserError
from megatron_posttrain.models import registry
from tests.helpers.family_checks import tiny_model
from tests.helpers.family_configs import tiny_configs

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
LLAMA = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 48}
LLAMA |= {"model_type": "llama", "vocab_size": 101, "max_position_embeddings": 256}  # type: ignore[operator]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    tiny_model(tiny_configs()["llama2"]).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], object], **keys: object) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = read_json(directory / "config.json") | keys
    (directory / "config.json").write_text(json.dumps(config))


def test_other_head_of_a_tied_model(directory: Path) -> None:
    rewrite(directory, lambda t: None, tie_word_embeddings=True)
    with pytest.raises(UserError, match=r"lm_head\.weight.*tie_word_embeddings"):
        check_directory(directory)
    rewrite(directory, lambda t: t.__setitem__(HEAD, t[EMBEDDING].clone()))
    check_directory(directory)
    other = shutil.copytree(directory, directory.parent / "other")
    rewrite(other, lambda t: t.pop(HEAD))
    assert all(isinstance(found, str) for found in compare(directory, other))
    rewrite(other, lambda t: t.__setitem__(HEAD, t[EMBEDDING] + 1))
    assert [found.name for found in compare(directory, other) if not isinstance(found, str)] == [HEAD]


def test_two_sets_of_weights(directory: Path) -> None:
    index = {"weight_map": {EMBEDDING: "model-00001-of-00001.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({EMBEDDING: torch.zeros(2)}, directory / "model-00001-of-00001.safetensors")
    with pytest.raises(UserError, match=r"two sets of weights.*index\.json"):
        check_directory(directory)


def test_fp8_without_its_section(directory: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"

    def quantise(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.ones(1, 1)

    rewrite(directory, quantise)
    with pytest.raises(UserError, match=f"{name}.*FP8.*quantization_config"):
        check_directory(directory)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
            "differ",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "mrope_section": [2, 2]}}, "mrope_section"),
        ({"logit_scale": 0.5}, "logit_scale is 0.5"),
        ({"use_qk_norm": True}, "use_qk_norm is True"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ({"attention_biass": True}, "did you mean 'attention_bias'"),
        ({"model_type": "mistral", "attention_bias": True}, "attention_bias is True"),
    ],
)
def test_key_that_would_be_passed_over(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        registry.architecture_from_hf(LLAMA | keys)


@pytest.mark.parametrize(
    "keys",
    [
        {"use_mrope": False, "unsloth_fixed": True, "is_llama_config": True, "rope_interleaved": False},
        {"pretraining_tp": 2, "_name_or_path": "x", "attention_dropout": 0.0, "embd_pdrop": 0.0},
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
    ],
)
def test_key_without_effect(keys: dict[str, Any]) -> None:
    registry.architecture_from_hf(LLAMA | keys)


@pytest.mark.parametrize("family", sorted(registry.FAMILIES))
def test_every_key_that_transformers_writes(family: str) -> None:
    registry.architecture_from_hf(AutoConfig.for_model(family).to_dict())


def test_dangling_links_say_so(directory: Path, tmp_path: Path) -> None:
    (directory / "tokenizer.json").symlink_to("../blobs/0")
    with pytest.raises(UserError, match=r"tokenizer\.json: dangling link to ../blobs/0"):
        check_directory(directory)
    with pytest.raises(UserError, match="dangling link"):
        plan_hf_to_megatron(directory, ConvertOptions())
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors").symlink_to("../blobs/1")
    with pytest.raises(UserError, match=r"model\.safetensors: dangling link"):
        check_directory(directory)


def test_hub_id_of_the_local_cache(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "hub" / "models--somebody--small"
    shutil.copytree(directory, root / "snapshots" / "abc")
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert check_directory(model_directory("somebody/small"))[1].num_layers == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_check_finite_sees_what_is_written(directory: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    rewrite(directory, lambda t: t[EMBEDDING].view(-1).__setitem__(0, 1e5))
    options = StreamOptions(check_finite=True, quiet=True)
    planned = plan_hf_to_megatron(directory, ConvertOptions(dtype=dtype))
    if dtype == torch.float32:
        planned.run(tmp_path / "out", options)
        return
    with pytest.raises(UserError, match=r"NaN or infinite values as torch\.float16"):
        planned.run(tmp_path / "out", options)
    target = tmp_path / "hf"
    with pytest.raises(NotFiniteError), HfWriter(target, {"x": (dtype, (1,))}, {}) as writer:
        writer.write("x", torch.tensor([1e5]))
    assert not target.exists()


def test_tokenizer_of_the_run_is_carried(tmp_path: Path) -> None:
    source, tokenizer, target = (tmp_path / name for name in ("source", "tokenizer", "target"))
    for place in (source, tokenizer, target):
        place.mkdir()
    for file in ("tokenizer.json", "vocab.json", "generation_config.json", "modeling_x.py"):
        (source / file).write_text("model")
    for file in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        (tokenizer / file).write_text("run")
    carry_side_files(source, target, custom_code=False, tokenizer=tokenizer)
    found = {path.name: path.read_text() for path in target.iterdir()}
    assert found == {"tokenizer.json": "run", "chat_template.jinja": "run", "generation_config.json": "model"}
