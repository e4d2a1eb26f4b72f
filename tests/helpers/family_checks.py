"""What every family is tested for, against a tiny model of `transformers`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from megatron_posttrain.checkpoint.hf import HfReader, check_directory, directory_layout, directory_writer
from megatron_posttrain.models import registry
from megatron_posttrain.models.architecture import Architecture
from megatron_posttrain.models.weights import Read, TensorPlan


def tiny_model(config: PreTrainedConfig, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """Random weights and buffers, none of them constant."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for tensor in model.state_dict().values():  # not RoPE's frequencies
            if tensor.is_floating_point():
                tensor.normal_(std=0.3)
        for module in model.modules():  # as in published checkpoints, and as `from_pretrained` has it
            if hasattr(module, "e_score_correction_bias"):
                module.e_score_correction_bias = module.e_score_correction_bias.float()
    return model.eval()


def saved_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a directory, through safetensors' own reader."""
    tensors: dict[str, torch.Tensor] = {}
    for path in directory.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


def split(plan: TensorPlan, read: Read, rank: int, size: int) -> torch.Tensor:
    """Shard `rank` of `size`, a new tensor in the dtype of the source."""
    out = torch.empty(plan.local_shape(size), dtype=read(plan.hf[0]).dtype)
    plan.fill(out, read, rank, size)
    return out


def join(plan: TensorPlan, shards: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The Hugging Face tensors, whole, from the shards of all tensor-parallel ranks."""
    out = [torch.empty(shape, dtype=shards[0].dtype) for shape in plan.shapes]
    dim = plan.mapping.dim
    for rank, shard in enumerate(shards):
        position = 0
        for source, start, stop in plan.mapping.segments(rank, len(shards)):
            if source is not None:
                out[source].narrow(dim, start, stop - start).copy_(shard.narrow(dim, position, stop - start))
            position += stop - start
    return dict(zip(plan.hf, out, strict=True))


def joined(arch: Architecture, directory: Path, size: int) -> Any:
    """Every tensor split over `size` ranks and joined again, in the table's names."""
    reader = HfReader(directory)
    read = directory_layout(reader, arch).reader(reader.get_slice)
    for plan in registry.tensors(arch):
        shards = [split(plan, read, rank, size) for rank in range(size)]
        assert all(tuple(shard.shape) == plan.local_shape(size) for shard in shards)
        yield from join(plan, shards).items()


def assert_same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def check_family(config: PreTrainedConfig, tmp_path: Path, *, moe: bool = False, sizes: Any = (1, 2)) -> Architecture:
    """Names, shapes and values against what `save_pretrained` writes; returns the architecture.

    Both layouts of experts where there are experts.
    """
    model = tiny_model(config)
    arch = None
    for fused in (False, True) if moe else (False,):
        source = tmp_path / f"source_{fused}"
        model.save_pretrained(source, save_original_format=not fused)
        saved = saved_tensors(source)
        source_config, arch = check_directory(source)
        layout = directory_layout(HfReader(source), arch)
        assert layout.shapes == {name: tuple(tensor.shape) for name, tensor in saved.items()}
        for size in sizes:
            assert_same_tensors(dict(layout.assemble(joined(arch, source, size))), saved)

        written = tmp_path / f"written_{fused}"
        layout, writer = directory_writer(written, arch, source=source, shard_bytes=20_000)
        with writer:
            for name, tensor in layout.assemble(joined(arch, source, sizes[-1])):
                writer.write(name, tensor)
        assert_same_tensors(saved_tensors(written), saved)
        kept = json.loads((written / "config.json").read_text())
        changed = {key for key in kept | source_config if kept.get(key) != source_config.get(key)}
        assert changed <= {"num_nextn_predict_layers", "num_mtp_layers"}
        again = AutoModelForCausalLM.from_pretrained(written, dtype="auto")
        assert_same_tensors(again.state_dict(), model.state_dict())

    assert arch is not None
    assert registry.parameter_count(arch) == sum(tensor.numel() for tensor in unique_tensors(model))
    return arch


def unique_tensors(model: PreTrainedModel) -> list[torch.Tensor]:
    """The checkpoint's tensors, tied ones once."""
    return list({tensor.data_ptr(): tensor for tensor in model.state_dict().values()}.values())
