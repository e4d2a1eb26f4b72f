"""torch.distributed.checkpoint's files (`torch_dist` of megatron-core), read lazily and laid out for streaming.

A tensor is stored in chunks; each chunk is the zip archive that `torch.save` would write, somewhere in a
`.distcp` file, and the pickle `.metadata` says where. Writing the archive around the data by hand means
that a tensor never has to be in memory: its bytes can be copied from where they are.
"""

from __future__ import annotations

import functools
import io
import math
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_posttrain.errors import UserError, nearest
from megatron_posttrain.models.weights import Shape

METADATA = ".metadata"
ALIGNMENT = 64  # bytes; where torch.save aligns a tensor's data
CHUNK_BYTES = 1 << 29  # a reader of any part of a chunk loads all of it, so large tensors have several
STORAGES = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.int64: torch.LongStorage,
    torch.int32: torch.IntStorage,
    torch.uint8: torch.ByteStorage,
}
DTYPES = {storage.__name__: dtype for dtype, storage in STORAGES.items()}


# ---- one chunk: the archive around a tensor's bytes ------------------------------------------------------


class _Storage(NamedTuple):
    dtype: torch.dtype
    elements: int


class _Rebuilt:
    """Pickles as the call that makes a tensor of a storage, as `torch.save` does."""

    def __init__(self, storage: _Storage, shape: Shape) -> None:
        self.storage, self.shape = storage, shape

    def __reduce__(self) -> Any:
        strides = tuple(math.prod(self.shape[dim + 1 :]) for dim in range(len(self.shape)))
        arguments: tuple[Any, ...] = (self.storage, 0, self.shape, strides, False, OrderedDict())
        return torch._utils._rebuild_tensor_v2, arguments


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, _Storage):
            return ("storage", STORAGES[value.dtype], "0", "cpu", value.elements)
        return None


@functools.lru_cache(maxsize=1024)
def archive(dtype: torch.dtype, shape: Shape) -> tuple[bytes, bytes]:
    """What `torch.load` wants to find before and after the bytes of a contiguous tensor.

    The bytes start at a multiple of 64 when the archive does. The data's checksum is left at zero, as
    with `torch.serialization.set_crc32_options(False)`: torch does not look at it.
    """
    content = io.BytesIO()
    elements = math.prod(shape)
    _Pickler(content, protocol=2).dump(_Rebuilt(_Storage(dtype, elements), shape))
    head, directory = b"", b""
    records: list[tuple[str, bytes | int]] = [("data.pkl", content.getvalue()), ("byteorder", b"little")]
    records += [("version", b"3\n"), ("data/0", elements * dtype.itemsize)]
    for name, data in records:
        full = f"archive/{name}".encode()
        size = data if isinstance(data, int) else len(data)
        checksum = 0 if isinstance(data, int) else zlib.crc32(data)
        fields = struct.pack("<HHHHHIII", 20, 0, 0, 0, 0x21, checksum, size, size)
        padding = b""
        if isinstance(data, int):
            start = len(head) + 30 + len(full) + 4
            fill = -start % ALIGNMENT
            padding = struct.pack("<2sH", b"FB", fill) + b"Z" * fill
        directory += struct.pack("<IH", 0x02014B50, 20) + fields
        directory += struct.pack("<HHHHHII", len(full), 0, 0, 0, 0, 0, len(head)) + full
        head += struct.pack("<I", 0x04034B50) + fields + struct.pack("<HH", len(full), len(padding)) + full + padding
        head += b"" if isinstance(data, int) else data
    end = len(head) + elements * dtype.itemsize
    count = len(records)
    return head, directory + struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, count, count, len(directory), end, 0)


class _Bytes(io.RawIOBase):
    """A part of a file as a file, without copying it."""

    def __init__(self, data: memoryview) -> None:
        self.data, self.position = data, 0

    def readinto(self, buffer: Any) -> int:
        count = min(len(buffer), len(self.data) - self.position)
        buffer[:count] = self.data[self.position : self.position + count]
        self.position += count
        return count

    def seek(self, offset: int, whence: int = 0) -> int:
        self.position = max(0, offset + (0, self.position, len(self.data))[whence])
        return self.position

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


class _Unpickler(pickle.Unpickler):
    """Reads how a tensor lies in its storage; refuses everything else a pickle could do."""

    def persistent_load(self, value: Any) -> Any:
        return value

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, stride, *rest: (storage, offset, shape, stride)
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda data, *rest: data
        if module == "torch" and name.endswith("Storage"):
            return DTYPES.get(name)
        raise pickle.UnpicklingError(f"{module}.{name}")


def unpack(file: Tensor, path: Path) -> Tensor:
    """The tensor of an archive [bytes] as a view of it (a copy where its data are not aligned)."""
    view = memoryview(file.numpy().data)
    try:
        with zipfile.ZipFile(_Bytes(view)) as content:  # type: ignore[arg-type]
            infos = {info.filename.partition("/")[2]: info for info in content.infolist()}
            described = _Unpickler(io.BytesIO(content.read(infos["data.pkl"]))).load()
            header = infos["data/0"].header_offset
        (_, dtype, _, _, elements), offset, shape, stride = described
        if dtype is None:
            raise ValueError("its dtype is not supported")
    except (zipfile.BadZipFile, pickle.UnpicklingError, KeyError, ValueError, TypeError, EOFError) as error:
        raise UserError(f"{path}: a tensor cannot be read ({error})") from None
    names, extra = struct.unpack("<HH", view[header + 26 : header + 30])
    start = header + 30 + names + extra
    data = file[start : start + elements * dtype.itemsize]
    if data.storage_offset() % dtype.itemsize:
        data = data.clone()
    data = data.view(dtype)
    return data.as_strided(shape, stride, data.storage_offset() + offset)


# ---- the checkpoint's catalogue --------------------------------------------------------------------------


class Place(NamedTuple):
    """A chunk: the part of a tensor at `offsets`, in bytes [start, start + length) of `file`."""

    offsets: Shape
    shape: Shape
    file: str
    start: int
    length: int


class Stored(NamedTuple):
    dtype: torch.dtype
    shape: Shape
    chunks: list[Place]


def write_metadata(directory: Path, tensors: dict[str, Stored], objects: dict[str, Place]) -> None:
    """`.metadata`: the tensors, and pickled objects, by key."""
    entries: dict[str, Any] = {}
    storage: dict[MetadataIndex, Any] = {}
    for key, stored in tensors.items():
        chunks = [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.shape)) for c in stored.chunks]
        properties = TensorProperties(dtype=stored.dtype)
        entries[key] = TensorStorageMetadata(properties, torch.Size(stored.shape), chunks)
        for number, chunk in enumerate(stored.chunks):
            storage[MetadataIndex(key, chunk.offsets, number)] = _info(chunk)
    for key, place in objects.items():
        entries[key] = BytesStorageMetadata()
        storage[MetadataIndex(key)] = _info(place)
    metadata = Metadata(entries, None, storage, StorageMeta(), "1.0.0")
    (directory / METADATA).write_bytes(pickle.dumps(metadata))


def _info(place: Place) -> Any:
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    return _StorageInfo(place.file, place.start, place.length)


class DistcpReader:
    """The tensors of a directory by key; nothing is loaded.

    `UserError` for a directory that is not a distributed checkpoint, and for missing or truncated files.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise UserError(f"{self.directory}: no such directory")
        if not (self.directory / METADATA).exists():
            raise UserError(f"{self.directory}: not a Megatron distributed checkpoint (it has no {METADATA} file)")
        try:
            metadata = FileSystemReader(self.directory).read_metadata()
        except (pickle.UnpicklingError, EOFError, AttributeError) as error:
            raise UserError(f"{self.directory / METADATA}: cannot be read ({error})") from None
        self.tensors: dict[str, Stored] = {}
        sizes: dict[str, int] = {}
        for key, entry in metadata.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata):
                continue
            chunks = []
            for chunk in entry.chunks:
                info = metadata.storage_data.get(MetadataIndex(key, chunk.offsets))
                if info is None:
                    raise UserError(f"{self.directory / METADATA}: lacks the place of a part of tensor '{key}'")
                chunks.append(Place(tuple(chunk.offsets), tuple(chunk.sizes), *_where(info)))
                sizes[info.relative_path] = max(sizes.get(info.relative_path, 0), info.offset + info.length)
            self.tensors[key] = Stored(entry.properties.dtype, tuple(entry.size), chunks)
        for file, size in sizes.items():
            self._check(self.directory / file, size)
        self._maps: dict[str, Tensor] = {}

    @staticmethod
    def _check(path: Path, size: int) -> None:
        if not path.exists():
            raise UserError(f"{path}: no such file")
        if (found := path.stat().st_size) < size:
            raise UserError(f"{path}: truncated: {found} bytes, {METADATA} says at least {size}")

    def stored(self, key: str) -> Stored:
        if key not in self.tensors:
            raise UserError(f"{self.directory}: no tensor '{key}'{nearest(key, self.tensors)}")
        return self.tensors[key]

    def get(self, key: str, leading: Shape = ()) -> Tensor:
        """Tensor `key`, or its part at index `leading` of the first dimensions.

        A view of the file where one chunk holds it, else put together in memory.
        """
        dtype, shape, chunks = self.stored(key)
        depth = len(leading)
        inside = [c for c in chunks if _covers(c, leading)]
        if len(inside) == 1 and inside[0].shape[depth:] == shape[depth:]:
            chunk = inside[0]
            return self._chunk(chunk, dtype)[tuple(i - o for i, o in zip(leading, chunk.offsets, strict=False))]
        out = torch.empty(shape[depth:], dtype=dtype)
        filled = 0
        for chunk in inside:
            index = tuple(i - o for i, o in zip(leading, chunk.offsets, strict=False))
            part = self._chunk(chunk, dtype)[index]
            where = zip(chunk.offsets[depth:], chunk.shape[depth:], strict=True)
            out[tuple(slice(offset, offset + length) for offset, length in where)] = part
            filled += part.numel()
        if filled != out.numel():
            raise UserError(f"{self.directory}: tensor '{key}' has {filled} of {out.numel()} elements")
        return out

    def _chunk(self, chunk: Place, dtype: torch.dtype) -> Tensor:
        path = self.directory / chunk.file
        if chunk.file not in self._maps:
            # Copy-on-write, so that torch takes it as writable; nobody writes.
            self._maps[chunk.file] = torch.from_numpy(np.memmap(path, dtype=np.uint8, mode="c"))
        tensor = unpack(self._maps[chunk.file][chunk.start : chunk.start + chunk.length], path)
        if tuple(tensor.shape) != chunk.shape or tensor.dtype != dtype:
            raise UserError(f"{path}: a chunk is {tensor.dtype} {list(tensor.shape)}, {METADATA} says otherwise")
        return tensor


def _where(info: Any) -> tuple[str, int, int]:
    return info.relative_path, info.offset, info.length


def _covers(chunk: Place, leading: Shape) -> bool:
    ranges = zip(leading, chunk.offsets, chunk.shape, strict=False)
    return all(offset <= index < offset + length for index, offset, length in ranges)
