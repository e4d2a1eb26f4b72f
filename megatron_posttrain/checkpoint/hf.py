"""Hugging Face directories: lazy reading and checks from the safetensors headers alone."""

from __future__ import annotations

import json
import struct
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_posttrain.errors import UserError, nearest
from megatron_posttrain.models import registry
from megatron_posttrain.models.architecture import Architecture, HfConfig
from megatron_posttrain.models.layout import Layout, has_fused
from megatron_posttrain.models.weights import Read, Shape

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Entry(NamedTuple):
    """Where a tensor lies: bytes [start, stop) of `file`."""

    file: Path
    dtype: torch.dtype
    shape: Shape
    start: int
    stop: int


def read_json(path: Path) -> Any:
    """`UserError` for a missing or malformed file, with the line of the mistake."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(f"{path}{line}: not valid JSON ({error})") from None


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file. `UserError` when it is missing, truncated or malformed."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
            if 8 + length > size:
                raise UserError(
                    f"{path}: truncated safetensors file ({size} bytes, its header is not complete)"
                )
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except ValueError as error:
        raise UserError(f"{path}: malformed safetensors header ({error})") from None
    entries = {}
    for name, value in header.items():
        if name == "__metadata__":
            continue
        if value["dtype"] not in DTYPES:
            raise UserError(f"{path}: tensor '{name}' has the unknown dtype {value['dtype']}")
        start, stop = (8 + length + offset for offset in value["data_offsets"])
        if stop > size:
            raise UserError(f"{path}: truncated: tensor '{name}' ends at byte {stop}, the file has {size}")
        entries[name] = Entry(path, DTYPES[value["dtype"]], tuple(value["shape"]), start, stop)
    return entries


class HfReader:
    """The tensors of a directory with `model.safetensors` or an index of several files; nothing is loaded.

    `UserError` names the file and the tensor when a file of the index is missing or truncated, or the
    index and the files do not agree.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise UserError(f"{self.directory}: no such directory")
        self._maps: dict[Path, Tensor] = {}
        index = self.directory / INDEX
        if not index.exists():
            if not (self.directory / SINGLE).exists():
                raise UserError(f"{self.directory}: has neither {SINGLE} nor {INDEX}")
            self._entries = read_header(self.directory / SINGLE)
            return
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise UserError(f"{index}: lacks 'weight_map'")
        headers = {name: read_header(self.directory / name) for name in sorted(set(weight_map.values()))}
        self._entries = {}
        for name, file in weight_map.items():
            if name not in headers[file]:
                raise UserError(f"{self.directory / file}: lacks tensor '{name}', which {INDEX} places there")
            self._entries[name] = headers[file][name]
        for file, entries in headers.items():
            if unlisted := sorted(set(entries) - set(weight_map)):
                raise UserError(f"{index}: lacks an entry for tensor '{unlisted[0]}', which is in {file}")

    def names(self) -> Collection[str]:
        return self._entries.keys()

    def entry(self, name: str) -> Entry:
        if name not in self._entries:
            raise UserError(f"{self.directory}: no tensor '{name}'{nearest(name, self._entries)}")
        return self._entries[name]

    def shape(self, name: str) -> Shape:
        return self.entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self.entry(name).dtype

    def get_slice(self, name: str) -> Tensor:
        """The tensor as a view of the file: only what is sliced out of it and copied is read."""
        entry = self.entry(name)
        if entry.file not in self._maps:
            # Copy-on-write, so that torch takes it as writable; nobody writes, so no page is ever copied.
            self._maps[entry.file] = torch.from_numpy(np.memmap(entry.file, dtype=np.uint8, mode="c"))
        data = self._maps[entry.file][entry.start : entry.stop]
        if entry.start % entry.dtype.itemsize:
            data = data.clone()  # torch views bytes as a wider dtype only where they are aligned
        return data.view(entry.dtype).view(entry.shape)


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
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method")
        raise UserError(f"{directory / 'config.json'}: weights quantised with {method!r} cannot be read")
    check_tensors(HfReader(directory), arch)
    return config, arch


def check_tensors(reader: HfReader, arch: Architecture) -> None:
    """Refuses missing, misshapen and unknown tensors with a `UserError`."""
    expected, names = directory_layout(reader, arch).shapes, reader.names()
    unknown = [name for name in names if name not in expected and not registry.is_ignored(arch, name)]
    for name, shape in expected.items():
        if name not in names:
            hint = nearest(name, unknown)
            raise UserError(f"{reader.directory}: missing tensor '{name}' of shape {list(shape)}{hint}")
        if reader.shape(name) != shape:
            found = list(reader.shape(name))
            raise UserError(
                f"{reader.entry(name).file}: tensor '{name}' has shape {found}, "
                f"config.json asks for {list(shape)}"
            )
    if unknown:
        raise UserError(
            f"{reader.entry(unknown[0]).file}: tensor '{unknown[0]}' is not part of config.json's "
            f"model ({len(unknown)} such){nearest(unknown[0], expected)}"
        )


def directory_layout(reader: HfReader, arch: Architecture) -> Layout:
    """How the directory arranges its tensors: experts one by one, or fused."""
    layers = [layer for layer in range(arch.num_layers) if arch.is_moe_layer(layer)]
    return registry.layout(arch, has_fused(reader.names(), registry.fusions(arch), layers))


def table_reader(reader: HfReader, arch: Architecture) -> Read:
    """`read(name)` for the names of the weight table, whatever the directory's layout."""
    return directory_layout(reader, arch).reader(reader.get_slice)
