"""The mappings against independent formulas, for random sizes; and what a directory is refused for."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_posttrain.checkpoint.hf import HfReader, HfWriter, check_directory
from megatron_posttrain.errors import UserError
from megatron_posttrain.models import registry
from megatron_posttrain.models.architecture import Architecture, MixtureOfExperts, Rope
from megatron_posttrain.models.weights import (
    QKV,
    ColumnParallel,
    GatedMLP,
    Mapping,
    Replicated,
    RowParallel,
    Vocabulary,
    expand,
    padded_vocab_size,
)
from tests.helpers.family_checks import join, split

small = st.integers(1, 4)


def numbered_tensor(*shape: int) -> Tensor:
    """All elements differ, so that no permutation goes unnoticed."""
    count = torch.Size(shape).numel()
    return torch.arange(1, count + 1, dtype=torch.float64).view(shape)


def check_round_trip(mapping: Mapping, tensors: list[Tensor], size: int) -> list[Tensor]:
    """Split over `size` ranks, reading through 2-D slices only; join is the inverse. Returns the shards."""
    (plan,) = expand([mapping])
    source = dict(zip(mapping.hf, tensors, strict=True))
    shards = [split(plan, source.__getitem__, rank, size) for rank in range(size)]
    assert {tuple(shard.shape) for shard in shards} == {plan.local_shape(size)}
    for name, tensor in join(plan, shards).items():
        assert torch.equal(tensor, source[name])
    return shards


@given(size=small, rows=small, columns=small, kind=st.sampled_from([ColumnParallel, RowParallel, Replicated]))
def test_plain_kinds(size: int, rows: int, columns: int, kind: type[Mapping]) -> None:
    tensor = numbered_tensor(rows * size, columns * size)
    shards = check_round_trip(kind("x", ("a",), (tuple(tensor.shape),)), [tensor], size)
    expected = {
        ColumnParallel: tensor.chunk(size, dim=0),
        RowParallel: tensor.chunk(size, dim=1),
        Replicated: [tensor] * size,
    }[kind]
    assert all(torch.equal(shard, part) for shard, part in zip(shards, expected, strict=True))


@given(size=st.integers(1, 8), rows=st.integers(1, 40))
def test_vocabulary_is_padded_with_zeros(size: int, rows: int) -> None:
    tensor = numbered_tensor(rows, 3)
    shards = check_round_trip(Vocabulary("x", ("a",), ((rows, 3),)), [tensor], size)
    whole = torch.cat(shards)
    assert len(whole) == padded_vocab_size(rows, size)
    assert len(whole) % size == 0
    assert len(whole) - rows < size
    assert torch.equal(whole[:rows], tensor)
    assert not whole[rows:].any()


@given(size=small, ffn=small, hidden=small)
def test_gated_mlp_shard_is_gate_above_up(size: int, ffn: int, hidden: int) -> None:
    gate, up = numbered_tensor(ffn * size, hidden), -numbered_tensor(ffn * size, hidden)
    shards = check_round_trip(GatedMLP("x", ("gate", "up"), ((ffn * size, hidden),) * 2), [gate, up], size)
    for shard, g, u in zip(shards, gate.chunk(size), up.chunk(size), strict=True):
        assert torch.equal(shard, torch.cat([g, u]))


@settings(max_examples=200)
@given(
    groups=st.integers(1, 8),
    heads_per_group=small,
    head_dim=st.sampled_from([2, 4, 8]),
    hidden=small,
    size=st.sampled_from([1, 2, 4, 8]),
    bias=st.booleans(),
)
def test_qkv_is_interleaved_by_group(
    groups: int, heads_per_group: int, head_dim: int, hidden: int, size: int, bias: bool
) -> None:
    """Reference: megatron-core's view [groups, heads + 2, head_dim, hidden], also for groups < ranks."""
    rows = groups * (heads_per_group + 2) * head_dim
    if rows % size:
        return
    rest = () if bias else (hidden,)
    q = numbered_tensor(groups * heads_per_group * head_dim, *rest)
    k, v = (numbered_tensor(groups * head_dim, *rest) + offset for offset in (10_000, 20_000))
    mapping = QKV("x", ("q", "k", "v"), tuple(tuple(t.shape) for t in (q, k, v)), groups=groups)
    shards = check_round_trip(mapping, [q, k, v], size)
    by_group = [t.view(groups, -1, head_dim, *rest) for t in (q, k, v)]
    reference = torch.cat(by_group, dim=1).reshape(rows, *rest)
    assert torch.equal(torch.cat(shards), reference)


@settings(max_examples=50)
@given(
    groups=small,
    heads_per_group=small,
    experts=st.integers(1, 6),
    width=small,
    size=st.sampled_from([1, 2, 4]),
    fused=st.booleans(),
    tied=st.booleans(),
)
def test_whole_model_split_and_joined(
    groups: int, heads_per_group: int, experts: int, width: int, size: int, fused: bool, tied: bool
) -> None:
    arch = Architecture(
        family="qwen3_moe",
        num_layers=2,
        hidden_size=8,
        num_heads=groups * heads_per_group,
        num_query_groups=groups,
        head_dim=4,
        ffn_size=4 * size,
        vocab_size=11,
        max_position=64,
        rope=Rope(),
        tied_embeddings=tied,
        qk_norm=True,
        moe=MixtureOfExperts(experts, 1, width * size, dense_layers=(0,)),
    )
    layout = registry.layout(arch, fused)
    disk = {name: torch.randn(shape) for name, shape in layout.shapes.items()}
    read = layout.reader(disk.__getitem__)
    whole = (
        item
        for plan in registry.tensors(arch)
        for item in join(plan, [split(plan, read, rank, size) for rank in range(size)]).items()
    )
    back = dict(layout.assemble(whole))
    assert back.keys() == disk.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in disk.items())


def test_only_the_slices_of_a_rank_are_read() -> None:
    class Recorder:
        def __init__(self) -> None:
            self.rows: list[tuple[int, int]] = []

        def __getitem__(self, index: slice) -> Tensor:
            self.rows.append((index.start, index.stop))
            return torch.zeros(index.stop - index.start, 3)

    recorder = Recorder()
    (plan,) = expand([ColumnParallel("x", ("a",), ((12, 3),))])
    plan.fill(torch.empty(3, 3), lambda name: recorder, 2, 4)
    assert recorder.rows == [(6, 9)]


def test_parameter_counts_of_published_models() -> None:
    """Against the counts on the models' cards: 30.5 and 235 billion, 0.6 billion with tied embeddings."""
    moe = {"model_type": "qwen3_moe", "vocab_size": 151936, "max_position_embeddings": 40960, "head_dim": 128}
    moe |= {"num_experts": 128, "num_experts_per_tok": 8, "num_key_value_heads": 4}
    small = {"hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32}
    large = {"hidden_size": 4096, "num_hidden_layers": 94, "num_attention_heads": 64}
    arch = registry.architecture_from_hf(moe | small | {"intermediate_size": 6144, "moe_intermediate_size": 768})
    assert registry.parameter_count(arch) == 30_532_122_624
    arch = registry.architecture_from_hf(moe | large | {"intermediate_size": 12288, "moe_intermediate_size": 1536})
    assert registry.parameter_count(arch) == 235_093_634_560


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen33"}, "'qwen33' is not supported (one of deepseek_v3, gpt_oss, llama"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"hidden_size": None}, "lacks 'hidden_size'"),
        (
            {"rope_scaling": {"type": "longrope"}},
            "rope type 'longrope'; supported: default, linear, llama3, yarn",
        ),
    ],
)
def test_config_is_refused(change: dict, message: str) -> None:
    config = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config |= {"vocab_size": 11, "intermediate_size": 16, "max_position_embeddings": 64}
    registry.architecture_from_hf(config)
    with pytest.raises(UserError) as caught:
        registry.architecture_from_hf(config | change)
    assert message in str(caught.value)


def test_old_and_new_rope_fields_are_the_same() -> None:
    config = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config |= {"vocab_size": 11, "intermediate_size": 16, "max_position_embeddings": 64}
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    old = config | {"rope_theta": 5e5, "rope_scaling": scaling}
    new = config | {"rope_parameters": {"rope_theta": 5e5} | scaling}
    assert registry.architecture_from_hf(old) == registry.architecture_from_hf(new)
    arch = registry.architecture_from_hf(old)
    assert registry.hf_config(arch, old) == old


# ---- directories -----------------------------------------------------------------------------------------


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A small model in two files."""
    config = {"model_type": "qwen3", "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    config |= {"vocab_size": 11, "intermediate_size": 16, "max_position_embeddings": 64, "head_dim": 4}
    config |= {"num_key_value_heads": 1}
    arch = registry.architecture_from_hf(config)
    tensors = {name: (torch.bfloat16, shape) for name, shape in registry.layout(arch).shapes.items()}
    torch.manual_seed(0)
    with HfWriter(tmp_path / "model", tensors, config, shard_bytes=1500) as writer:
        for name, (dtype, shape) in tensors.items():
            writer.write(name, torch.randn(shape).to(dtype))
    check_directory(tmp_path / "model")
    return tmp_path / "model"


def rewrite(directory: Path, number: int, change: Callable[[dict[str, Tensor]], None]) -> None:
    path = sorted(directory.glob("*.safetensors"))[number]
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def refused(directory: Path) -> str:
    with pytest.raises(UserError) as caught:
        check_directory(directory)
    return str(caught.value)


def set_tensor(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.__setitem__(name, tensor)


def test_misshapen_tensor(directory: Path) -> None:
    rewrite(directory, 0, set_tensor("model.embed_tokens.weight", torch.zeros(12, 8)))
    message = refused(directory)
    assert "'model.embed_tokens.weight' has shape [12, 8], config.json asks for [11, 8]" in message
    assert "model-00001-of-" in message


def test_missing_and_misnamed_tensor(directory: Path) -> None:
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name, wrong = "model.layers.0.self_attn.q_norm.weight", "model.layers.0.self_attn.qnorm.weight"
    number = sorted(set(content["weight_map"].values())).index(content["weight_map"][name])
    rewrite(directory, number, lambda tensors: tensors.__setitem__(wrong, tensors.pop(name)))
    assert f"lacks tensor '{name}'" in refused(directory)
    content["weight_map"][wrong] = content["weight_map"].pop(name)
    index.write_text(json.dumps(content))
    assert f"missing tensor '{name}' of shape [4]; did you mean '{wrong}'?" in refused(directory)


def test_unknown_tensor(directory: Path) -> None:
    index = directory / "model.safetensors.index.json"
    rewrite(directory, 0, set_tensor("extra.weight", torch.zeros(1)))
    assert "lacks an entry for tensor 'extra.weight'" in refused(directory)
    content = json.loads(index.read_text())
    content["weight_map"]["extra.weight"] = sorted(path.name for path in directory.glob("*.safetensors"))[0]
    index.write_text(json.dumps(content))
    assert "tensor 'extra.weight' is not part of config.json's model" in refused(directory)


def test_missing_truncated_and_malformed_files(directory: Path) -> None:
    path = sorted(directory.glob("*.safetensors"))[1]
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    assert f"{path}: truncated: tensor" in refused(directory)
    path.write_bytes(content[:20])
    assert f"{path}: truncated safetensors file" in refused(directory)
    path.write_bytes(struct.pack("<Q", 4) + b"nope" + content)
    assert f"{path}: malformed safetensors header" in refused(directory)
    path.unlink()
    assert f"{path}: no such file" in refused(directory)
    assert "no such directory" in refused(directory / "nowhere")
    (directory / "config.json").write_text('{\n"model_type": }')
    assert "config.json:2: not valid JSON" in refused(directory)


def test_quantised_weights_are_refused(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (directory / "config.json").write_text(json.dumps(config))
    assert "weights quantised with 'mxfp4' cannot be read" in refused(directory)


def test_reader_gives_what_safetensors_gives(directory: Path) -> None:
    reader = HfReader(directory)
    for path in directory.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            assert torch.equal(reader.get_slice(name), tensor)
            assert reader.dtype(name) == torch.bfloat16
    with pytest.raises(UserError, match=r"did you mean 'model\.norm\.weight'"):
        reader.get_slice("model.norms.weight")


def test_unfinished_directory_is_not_left_behind(tmp_path: Path) -> None:
    target = tmp_path / "model"
    tensors = {"a": (torch.float32, (2,)), "b": (torch.float32, (3,))}
    with pytest.raises(ValueError, match="'b' was not written"), HfWriter(target, tensors, {}) as writer:
        writer.write("a", torch.zeros(2))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyboardInterrupt), HfWriter(target, tensors, {}):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_side_files_are_carried_and_code_is_not(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    for name in ("tokenizer.json", "chat_template.jinja", "modeling_x.py", "model.safetensors", "old.bin"):
        (source / name).write_text(name)
    config = {"auto_map": {"AutoModel": "modeling_x.X"}, "keep": 1}
    tensors = {"a": (torch.float32, (2,))}
    with HfWriter(target, tensors, config, source=source) as writer:
        writer.write("a", torch.ones(2))
    found = {path.name for path in target.iterdir()}
    assert found == {"tokenizer.json", "chat_template.jinja", "model.safetensors", "config.json"}
    assert json.loads((target / "config.json").read_text()) == {"keep": 1}
    with pytest.raises(UserError, match="exists and is not empty"):
        HfWriter(target, tensors, config)
    with HfWriter(target, tensors, config, source=source, custom_code=True, overwrite=True) as writer:
        writer.write("a", torch.zeros(2))
    assert (target / "modeling_x.py").exists()
    assert not load_file(target / "model.safetensors")["a"].any()
    assert {path.name for path in tmp_path.iterdir()} == {"source", "target"}
