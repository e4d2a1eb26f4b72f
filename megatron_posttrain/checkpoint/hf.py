"""Hugging Face directories of models: checked from their headers, read and written by the weight table."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_posttrain.checkpoint.hf_files import HfReader, HfWriter, has_weights, read_json, side_file_paths
from megatron_posttrain.errors import UserError, nearest, nearest_file
from megatron_posttrain.models import fp8, registry
from megatron_posttrain.models.architecture import Architecture, HfConfig
from megatron_posttrain.models.disk_layout import DiskLayout
from megatron_posttrain.models.weights import Read

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def check_directory(directory: Path | str, serving: bool = False) -> tuple[HfConfig, Architecture]:
    """The config and architecture of a directory whose tensors are all there, in the right shapes. Reads config.json
    and headers only. `UserError` names the first tensor that is missing, misshapen or not part of the model. `serving`:
    what compressed-tensors packed (tools/quantize.py) is left to vLLM."""
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory")
    config = read_json(directory / "config.json")
    arch = registry.architecture_from_hf(config)
    if serving and config.get(fp8.FIELD, {}).get("quant_method") == "compressed-tensors":
        return config, arch
    try:
        fp8.block_size(config)
    except UserError as error:
        raise UserError(f"{directory}/{error}") from None
    check_tensors(HfReader(directory), arch)
    side_file_paths(directory)
    return config, arch


def check_tensors(reader: HfReader, arch: Architecture) -> None:
    """Refuses missing, misshapen and unknown tensors with a `UserError`."""
    expected, names = dict(directory_layout(reader, arch).shapes), reader.names()
    for name, shape in list(expected.items()):
        if name in names and reader.dtype(name) == fp8.DTYPE and len(shape) == 2:
            expected[name + fp8.SUFFIX] = fp8.scale_shape(shape, reader.fp8_block or (fp8.BLOCK, fp8.BLOCK))
    unknown = [name for name in names if name not in expected and not registry.is_ignored(arch, name)]
    for name in expected.keys() & set(names):
        if reader.dtype(name) == fp8.DTYPE and reader.fp8_block is None:
            raise UserError(
                f"{reader.entry(name).file}: tensor '{name}' is FP8, but config.json has no {fp8.FIELD}, by which "
                "its scales are read; put the section back"
            )
        if not reader.dtype(name).is_floating_point:
            raise UserError(f"{reader.entry(name).file}: tensor '{name}' is {reader.dtype(name)}; supported: floats")
    if arch.tied_embeddings and HEAD in names and not is_tied_copy(reader):
        raise UserError(
            f"{reader.entry(HEAD).file}: tensor '{HEAD}' is not '{EMBEDDING}', though config.json says that "
            "tie_word_embeddings is true; set it to false to keep both, or remove the tensor"
        )
    for name, shape in expected.items():
        if name not in names:
            hint = nearest(name, unknown)
            raise UserError(f"{reader.directory}: missing tensor '{name}' of shape {list(shape)}{hint}")
        if (found := reader.entry(name)).shape != shape:
            shapes = f"has shape {list(found.shape)}, config.json asks for {list(shape)}"
            raise UserError(f"{found.file}: tensor '{name}' {shapes}")
    if unknown:
        raise UserError(
            f"{reader.entry(unknown[0]).file}: tensor '{unknown[0]}' is not part of config.json's "
            f"model ({len(unknown)} such){nearest(unknown[0], expected)}"
        )


def model_directory(path: str, key: str = "model.path") -> Path:
    """A local directory, or the directory of a hub id in the local cache; nothing is downloaded."""
    if (place := Path(path)).is_dir():
        if (place / "adapter_config.json").is_file() and not (place / "config.json").is_file():
            raise UserError(f"{key}: {path} holds an adapter; merge it into its model first: tools/merge_adapter.py")
        if (place / ".metadata").is_file():
            raise UserError(f"{key}: {path} is a Megatron checkpoint; convert it: tools/convert_megatron_to_hf.py")
        return place
    if place.is_file():
        raise UserError(f"{key}: {path} is a file; name its directory, {place.parent}")
    if path.count("/") == 1 and not path.startswith((".", "/")):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            return Path(snapshot_download(path, local_files_only=True))
        except LocalEntryNotFoundError:
            cached = "no hub model of that id in the local cache (fetch it first with `hf download`)"
            raise UserError(f"{key}: no directory '{path}', and {cached}") from None
    raise UserError(f"{key}: no directory '{path}'{nearest_file(Path(path))}")


def is_tied_copy(reader: HfReader) -> bool:
    """Whether the output layer that the directory holds is its word embeddings."""
    if not {HEAD, EMBEDDING} <= set(reader.names()) or reader.entry(HEAD).shape != reader.entry(EMBEDDING).shape:
        return False
    pairs = zip(reader.get_slice(HEAD).split(4096), reader.get_slice(EMBEDDING).split(4096), strict=True)
    return reader.dtype(HEAD) == reader.dtype(EMBEDDING) and all(torch.equal(*pair) for pair in pairs)


def directory_layout(reader: HfReader, arch: Architecture) -> DiskLayout:
    """How the directory arranges its tensors: experts one by one, or fused."""
    fused, separate = registry.layout(arch, fused=True), registry.layout(arch)
    return fused if any(n in reader.names() and n not in separate.shapes for n in fused.shapes) else separate


def table_reader(reader: HfReader, arch: Architecture) -> Read:
    """`read(name)` for the names of the weight table, whatever the directory's layout; FP8 comes as bf16."""
    get = fp8.reader(reader.get_slice, reader.names(), reader.fp8_block)
    return directory_layout(reader, arch).reader(get)


def directory_writer(
    directory: Path | str, arch: Architecture, *, source: Path, stages: Mapping[str, int] | None = None, **options: Any
) -> tuple[DiskLayout, HfWriter]:
    """The writer of a whole Hugging Face directory, and the layout of its tensors; `options`: `HfWriter`'s.

    `source`: the directory that the model came from. Its side files, the fields of its config and, where it
    has weights, their dtypes and its layout of experts are kept; else tensors are bf16. `stages`: who writes a
    tensor of the weight table, where several processes share the work.
    """
    layout, kinds = registry.layout(arch), {}
    if has_weights(source):  # else: random initialisation
        reader = HfReader(source)
        layout = directory_layout(reader, arch)
        kinds = {name: reader.plain_dtype(name) for name in reader.names()}
    usual = kinds.get(EMBEDDING, torch.bfloat16)  # of a new head
    contents = {name: (kinds.get(name, layout.dtypes.get(name, usual)), shape) for name, shape in layout.shapes.items()}
    config = registry.hf_config(arch, read_json(source / "config.json"))
    owners = None if stages is None else {name: stages[layout.table_names[name][0]] for name in contents}
    return layout, HfWriter(directory, contents, config, source=source, owners=owners, **options)
