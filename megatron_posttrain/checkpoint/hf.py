"""Hugging Face directories of models: checked from their headers, read and written by the weight table."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from megatron_posttrain.checkpoint.hf_files import SHARD_BYTES, HfReader, HfWriter, has_weights, read_json
from megatron_posttrain.errors import UserError, nearest
from megatron_posttrain.models import fp8, registry
from megatron_posttrain.models.architecture import Architecture, HfConfig
from megatron_posttrain.models.layout import Layout
from megatron_posttrain.models.weights import Read

__all__ = ["HfReader", "HfWriter", "check_directory", "read_json", "table_reader", "write_directory"]


def check_directory(directory: Path | str) -> tuple[HfConfig, Architecture]:
    """The config and architecture of a directory whose tensors are all there, in the right shapes.

    Reads config.json and headers only. `UserError` names the first tensor that is missing, misshapen
    or not part of the model.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory")
    config = read_json(directory / "config.json")
    arch = registry.architecture_from_hf(config)
    try:
        fp8.block_size(config)
    except UserError as error:
        raise UserError(f"{directory}/{error}") from None
    check_tensors(HfReader(directory), arch)
    return config, arch


def check_tensors(reader: HfReader, arch: Architecture) -> None:
    """Refuses missing, misshapen and unknown tensors with a `UserError`."""
    expected, names = dict(directory_layout(reader, arch).shapes), reader.names()
    for name, shape in list(expected.items()):
        if name in names and reader.dtype(name) == fp8.DTYPE and len(shape) == 2:
            expected[name + fp8.SUFFIX] = fp8.scale_shape(shape, reader.fp8_block or (fp8.BLOCK, fp8.BLOCK))
    unknown = [name for name in names if name not in expected and not registry.is_ignored(arch, name)]
    for name, shape in expected.items():
        if name not in names:
            hint = nearest(name, unknown)
            raise UserError(f"{reader.directory}: missing tensor '{name}' of shape {list(shape)}{hint}")
        if (found := reader.entry(name)).shape != shape:
            raise UserError(
                f"{found.file}: tensor '{name}' has shape {list(found.shape)}, config.json asks for {list(shape)}"
            )
    if unknown:
        raise UserError(
            f"{reader.entry(unknown[0]).file}: tensor '{unknown[0]}' is not part of config.json's "
            f"model ({len(unknown)} such){nearest(unknown[0], expected)}"
        )


def directory_layout(reader: HfReader, arch: Architecture) -> Layout:
    """How the directory arranges its tensors: experts one by one, or fused."""
    fused, separate = registry.layout(arch, fused=True), registry.layout(arch)
    return fused if any(n in reader.names() and n not in separate.shapes for n in fused.shapes) else separate


def table_reader(reader: HfReader, arch: Architecture) -> Read:
    """`read(name)` for the names of the weight table, whatever the directory's layout; FP8 comes as bf16."""
    get = fp8.reader(reader.get_slice, reader.names(), reader.fp8_block)
    return directory_layout(reader, arch).reader(get)


def write_directory(
    directory: Path | str,
    arch: Architecture,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    source: Path | str,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """A whole Hugging Face directory from the tensors of the weight table (`models.sharded.Exporter`).

    `source`: the directory that the model came from. Its side files, the fields of its config and, where it
    has weights, their dtypes and its layout of experts are kept; else tensors are bf16.
    """
    layout, kinds = registry.layout(arch), {}
    if has_weights(Path(source)):  # else: random initialisation
        reader = HfReader(source)
        layout = directory_layout(reader, arch)
        kinds = {name: reader.plain_dtype(name) for name in reader.names()}
    contents = {
        name: (kinds.get(name, layout.dtypes.get(name, torch.bfloat16)), shape) for name, shape in layout.shapes.items()
    }
    config = fp8.without(registry.hf_config(arch, read_json(Path(source) / "config.json")))
    with HfWriter(directory, contents, config, source=source, shard_bytes=shard_bytes, overwrite=overwrite) as writer:
        for name, tensor in layout.assemble(tensors):
            writer.write(name, tensor)
