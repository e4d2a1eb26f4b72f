"""Writes Hugging Face directories: streamed, sharded, and there only when complete."""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_posttrain.checkpoint.hf import DTYPES, INDEX, SINGLE, HfReader, directory_layout, read_json
from megatron_posttrain.errors import UserError
from megatron_posttrain.models import registry
from megatron_posttrain.models.architecture import Architecture, HfConfig
from megatron_posttrain.models.layout import Layout
from megatron_posttrain.models.weights import Shape

SHARD_BYTES = 5_000_000_000
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}

Tensors = Mapping[str, tuple[torch.dtype, Shape]]


class Target(NamedTuple):
    """Where a tensor is to be written: from byte `start` of `file`."""

    file: str
    dtype: torch.dtype
    shape: Shape
    start: int


def plan_shards(tensors: Tensors, shard_bytes: int) -> tuple[dict[str, Target], dict[str, bytes]]:
    """Every tensor's place, and the header of every file, before anything is written.

    Files are filled in order up to `shard_bytes`; a larger tensor has a file of its own.
    """
    shards: list[list[str]] = []
    filled = 0
    for name, (dtype, shape) in tensors.items():
        nbytes = math.prod(shape) * dtype.itemsize
        if not shards or filled + nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += nbytes
    targets, headers = {}, {}
    for number, names in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name in names:
            dtype, shape = tensors[name]
            stop = offset + math.prod(shape) * dtype.itemsize
            header[name] = {
                "dtype": DTYPE_NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [offset, stop],
            }
            offset = stop
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # data starts at a multiple of 8 bytes
        headers[file] = struct.pack("<Q", len(text)) + text
        for name in names:
            start = len(headers[file]) + header[name]["data_offsets"][0]  # type: ignore[index]
            targets[name] = Target(file, *tensors[name], start)
    return targets, headers


class HfWriter:
    """Streams tensors, in any order, into a temporary sibling that becomes `directory` when all are there.

    A context manager: after an exception nothing is left behind.

    Args:
        tensors: dtype and shape by name, all of them, in the order of the files.
        config: the config.json.
        source: a directory whose side files (tokenizer, chat template, generation config, licence) are
            carried along.
        shard_bytes: largest size of a file's tensors.
        custom_code: carry Python files of `source` along too; without it they stay behind and
            config.json loses its `auto_map`.
        overwrite: replace an existing directory; without it that is a `UserError`.
    """

    def __init__(
        self,
        directory: Path | str,
        tensors: Tensors,
        config: HfConfig,
        *,
        source: Path | str | None = None,
        shard_bytes: int = SHARD_BYTES,
        custom_code: bool = False,
        overwrite: bool = False,
    ) -> None:
        self.directory = Path(directory)
        if self.directory.exists() and not overwrite and any(self.directory.iterdir()):
            raise UserError(f"{self.directory}: exists and is not empty")
        self.partial = self.directory.with_name(f".{self.directory.name}.partial")
        self.config, self.custom_code = dict(config), custom_code
        if not custom_code:
            self.config.pop("auto_map", None)
        self.source = None if source is None else Path(source)
        self.targets, headers = plan_shards(tensors, shard_bytes)
        self.missing = set(self.targets)
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        self.descriptors: dict[str, int] = {}
        for file, header in headers.items():
            path = self.partial / file
            self.descriptors[file] = os.open(path, os.O_CREAT | os.O_WRONLY, 0o644)
            _write(self.descriptors[file], memoryview(header), 0, path)

    def write(self, name: str, tensor: Tensor) -> None:
        """Converts to the dtype on disk. `ValueError` for a name or shape that was not announced."""
        target = self.targets[name]
        if tuple(tensor.shape) != target.shape:
            raise ValueError(
                f"tensor '{name}' has shape {list(tensor.shape)}, announced was {list(target.shape)}"
            )
        data = tensor.detach().to(device="cpu", dtype=target.dtype).contiguous()
        content = memoryview(data.reshape(-1).view(torch.uint8).numpy().data)
        _write(self.descriptors[target.file], content, target.start, self.partial / target.file)
        self.missing.discard(name)

    def close(self) -> None:
        """Writes index, config and side files, and puts the directory in its place."""
        if self.missing:
            first = sorted(self.missing)[0]
            raise ValueError(f"{self.directory}: tensor '{first}' was not written ({len(self.missing)} such)")
        self._close_files()
        if self.source is not None:
            self._carry(self.source)
        if SINGLE not in {target.file for target in self.targets.values()}:
            total = sum(math.prod(t.shape) * t.dtype.itemsize for t in self.targets.values())
            weight_map = {name: target.file for name, target in self.targets.items()}
            _write_json(self.partial / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        _write_json(self.partial / "config.json", self.config)
        if self.directory.exists():
            old = self.directory.with_name(f".{self.directory.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            self.directory.rename(old)
            self.partial.rename(self.directory)
            shutil.rmtree(old)
        else:
            self.partial.rename(self.directory)

    def _carry(self, source: Path) -> None:
        for path in sorted(source.iterdir()):
            weights = path.suffix in WEIGHT_SUFFIXES or path.name.endswith(".index.json")
            if weights or path.name == "config.json" or path.name.startswith("."):
                continue
            if path.is_dir() and path.name == "additional_chat_templates":
                shutil.copytree(path, self.partial / path.name)
            elif path.is_file() and (path.suffix != ".py" or self.custom_code):
                shutil.copyfile(path, self.partial / path.name)

    def _close_files(self) -> None:
        while self.descriptors:
            os.close(self.descriptors.popitem()[1])

    def __enter__(self) -> HfWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            self._close_files()
            shutil.rmtree(self.partial, ignore_errors=True)  # renamed, when all went well


def _write(descriptor: int, content: memoryview, start: int, path: Path) -> None:
    done = 0
    while done < len(content):  # one call writes 2 GiB at most
        try:
            done += os.pwrite(descriptor, content[done:], start + done)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from error


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def disk_tensors(
    arch: Architecture, layout: Layout, dtype: torch.dtype | None, source: HfReader | None
) -> dict[str, tuple[torch.dtype, Shape]]:
    """What a directory of this layout holds. A tensor's dtype: `dtype`, else that of `source`, else bf16.

    Tensors that the family keeps in a wider dtype (DeepSeek's correction biases) keep theirs.
    """
    tensors = {}
    for name, shape in layout.shapes.items():
        kind = dtype or torch.bfloat16
        if name in layout.dtypes:
            kind = layout.dtypes[name]
        if source is not None and name in source.names() and (dtype is None or name in layout.dtypes):
            kind = source.dtype(name)
        tensors[name] = (kind, shape)
    return tensors


def write_directory(
    directory: Path | str,
    arch: Architecture,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    source: Path | str | None = None,
    dtype: torch.dtype | None = None,
    fused: bool | None = None,
    shard_bytes: int = SHARD_BYTES,
    custom_code: bool = False,
    overwrite: bool = False,
) -> None:
    """A whole Hugging Face directory from the tensors of the weight table (`models.export.export_hf`).

    Args:
        source: the directory that the model came from: its side files, the fields of its config, its
            dtypes and its layout of experts are kept.
        dtype: of the tensors; None: as in `source`, bf16 without one.
        fused: experts in one 3-D tensor a layer; None: as in `source`.
    """
    reader, config = None, None
    if source is not None:
        reader, config = HfReader(source), read_json(Path(source) / "config.json")
    if reader is not None and fused is None:
        layout = directory_layout(reader, arch)
    else:
        layout = registry.layout(arch, bool(fused))
    written = registry.hf_config(arch, config)
    if dtype is not None or config is None:
        written = {k: v for k, v in written.items() if k != "torch_dtype"}
        written["dtype"] = str(dtype or torch.bfloat16).removeprefix("torch.")
    contents = disk_tensors(arch, layout, dtype, reader)
    with HfWriter(
        directory,
        contents,
        written,
        source=source,
        shard_bytes=shard_bytes,
        custom_code=custom_code,
        overwrite=overwrite,
    ) as writer:
        for name, tensor in layout.assemble(tensors):
            writer.write(name, tensor)
