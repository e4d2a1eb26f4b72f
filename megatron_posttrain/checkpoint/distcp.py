"""torch.distributed.checkpoint's files (`torch_dist` of megatron-core), read lazily and laid out for streaming.

A tensor is stored in chunks; each chunk is the zip archive that `torch.save` would write, somewhere in a
`.distcp` file, and the pickle `.metadata` says where. torch writes and reads the archive without the data, so a
tensor never has to be in memory: its bytes can be copied from where they are.
"""

import functools
import io
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, _weights_only_unpickler
from torch.distributed.checkpoint import FileSystemReader, metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from megatron_posttrain.checkpoint.stream import map_file
from megatron_posttrain.errors import UserError, nearest
from megatron_posttrain.models.weights import Shape

METADATA = ".metadata"
ALIGNMENT = 64  # bytes; where torch.save aligns a tensor's data
CHUNK_BYTES = 1 << 29  # a reader of any part of a chunk loads all of it, so large tensors have several


# ---- one chunk: the archive around a tensor's bytes ------------------------------------------------------


class _Frame(io.RawIOBase):
    """The file that `torch.save` writes to: keeps what comes before and after the data, which it skips."""

    def __init__(self) -> None:
        self.parts = [b"", b""]
        self.after = 0

    def write(self, content: Any) -> int:
        self.parts[self.after] += bytes(content)
        return len(content)

    def seek(self, offset: int, whence: int = 0) -> int:
        self.after = 1
        return offset


@functools.lru_cache(maxsize=1024)
def archive(dtype: torch.dtype, shape: Shape) -> tuple[bytes, bytes]:
    """What `torch.load` wants to find before and after the bytes of a contiguous tensor. The bytes start at a multiple
    of 64 when the archive does."""
    frame = _Frame()
    with torch.serialization.skip_data():  # memory that is neither written nor read takes none
        torch.save(torch.empty(shape, dtype=dtype), frame)  # type: ignore[arg-type]
    return frame.parts[0], frame.parts[1]


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
        self.position = offset + (0, self.position, len(self.data))[whence]
        return self.position


def unpack(file: Tensor, path: Path) -> Tensor:
    """The tensor of an archive [bytes] as a view of it (a copy where its data are not aligned)."""

    def storage(saved: Any) -> Any:
        _, kind, key, _, elements = saved
        dtype = getattr(kind, "dtype", torch.uint8)  # FP8 lies in storages without a dtype
        start = file.storage_offset() + content.get_record_offset(f"data/{key}")
        data = file.untyped_storage()[start : start + elements * dtype.itemsize]
        if start % dtype.itemsize:
            data = data.clone()
        return torch.storage.TypedStorage(wrap_storage=data, dtype=dtype, _internal=True)

    try:
        content = torch._C.PyTorchFileReader(_Bytes(memoryview(file.numpy().data)))  # type: ignore[call-overload]
        unpickler = _weights_only_unpickler.Unpickler(io.BytesIO(content.get_record("data.pkl")))
        unpickler.persistent_load = storage  # type: ignore[method-assign]
        return unpickler.load()
    except (RuntimeError, pickle.UnpicklingError, ValueError, TypeError, EOFError) as error:
        raise UserError(f"{path}: a tensor cannot be read ({error})") from None


# ---- the checkpoint's catalogue --------------------------------------------------------------------------


class StoredChunk(NamedTuple):
    """A chunk: the part of a tensor at `offsets`, in bytes [start, start + length) of `file`."""

    offsets: Shape
    shape: Shape
    file: str
    start: int
    length: int


class Stored(NamedTuple):
    dtype: torch.dtype
    shape: Shape
    chunks: list[StoredChunk]


def write_metadata(directory: Path, tensors: dict[str, Stored], objects: dict[str, StoredChunk]) -> None:
    """`.metadata`: the tensors, and pickled objects, by key."""
    entries: dict[str, Any] = {}
    storage: dict[MetadataIndex, Any] = {}
    for key, stored in tensors.items():
        chunks = [metadata.ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.shape)) for c in stored.chunks]
        properties = metadata.TensorProperties(dtype=stored.dtype)
        entries[key] = TensorStorageMetadata(properties, torch.Size(stored.shape), chunks)
        for number, chunk in enumerate(stored.chunks):
            storage[MetadataIndex(key, chunk.offsets, number)] = _StorageInfo(chunk.file, chunk.start, chunk.length)
    for key, place in objects.items():
        entries[key] = metadata.BytesStorageMetadata()
        storage[MetadataIndex(key)] = _StorageInfo(place.file, place.start, place.length)
    catalogue = metadata.Metadata(entries, None, storage, metadata.StorageMeta(), "1.0.0")
    (directory / METADATA).write_bytes(pickle.dumps(catalogue))


class DistcpReader:
    """The tensors of a directory by key; nothing is loaded. `UserError` for a directory that is not a distributed
    checkpoint, and for missing or truncated files."""

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise UserError(f"{self.directory}: no such directory")
        if not (self.directory / METADATA).exists():
            raise UserError(f"{self.directory}: not a Megatron distributed checkpoint (it has no {METADATA} file)")
        try:
            catalogue = FileSystemReader(self.directory).read_metadata()
        except (pickle.UnpicklingError, EOFError, AttributeError) as error:
            raise UserError(f"{self.directory / METADATA}: cannot be read ({error})") from None
        self.tensors: dict[str, Stored] = {}
        sizes: dict[str, int] = {}
        for key, entry in catalogue.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata):
                continue
            chunks = []
            for chunk in entry.chunks:
                info = catalogue.storage_data.get(MetadataIndex(key, chunk.offsets))
                if info is None:
                    raise UserError(f"{self.directory / METADATA}: lacks the place of a part of tensor '{key}'")
                file, start, length = info.relative_path, info.offset, info.length
                chunks.append(StoredChunk(tuple(chunk.offsets), tuple(chunk.sizes), file, start, length))
                sizes[file] = max(sizes.get(file, 0), start + length)
            self.tensors[key] = Stored(entry.properties.dtype, tuple(entry.size), chunks)
        for file, size in sizes.items():
            path = self.directory / file
            if not path.exists():
                raise UserError(f"{path}: no such file")
            if (found := path.stat().st_size) < size:
                raise UserError(f"{path}: truncated: {found} bytes, {METADATA} says at least {size}")
        self._maps: dict[str, Tensor] = {}

    def stored(self, key: str) -> Stored:
        if key not in self.tensors:
            raise UserError(f"{self.directory}: no tensor '{key}'{nearest(key, self.tensors)}")
        return self.tensors[key]

    def get(self, key: str, leading: Shape = ()) -> Tensor:
        """Tensor `key`, or its part at index `leading` of the first dimensions. A view of the file where one chunk
        holds it, else put together in memory."""
        dtype, shape, chunks = self.stored(key)
        depth = len(leading)
        indices = [(c, tuple(i - o for i, o in zip(leading, c.offsets, strict=False))) for c in chunks]
        inside = [(c, at) for c, at in indices if all(0 <= i < n for i, n in zip(at, c.shape, strict=False))]
        if len(inside) == 1 and inside[0][0].shape[depth:] == shape[depth:]:
            return self._chunk(inside[0][0], dtype)[inside[0][1]]
        out = torch.empty(shape[depth:], dtype=dtype)
        filled = 0
        for chunk, index in inside:
            part = self._chunk(chunk, dtype)[index]
            where = zip(chunk.offsets[depth:], chunk.shape[depth:], strict=True)
            out[tuple(slice(offset, offset + length) for offset, length in where)] = part
            filled += part.numel()
        if filled != out.numel():
            raise UserError(f"{self.directory}: tensor '{key}' has {filled} of {out.numel()} elements")
        return out

    def _chunk(self, chunk: StoredChunk, dtype: torch.dtype) -> Tensor:
        path = self.directory / chunk.file
        if chunk.file not in self._maps:
            self._maps[chunk.file] = map_file(path)
        tensor = unpack(self._maps[chunk.file][chunk.start : chunk.start + chunk.length], path)
        if tuple(tensor.shape) != chunk.shape or tensor.dtype != dtype:
            raise UserError(f"{path}: a chunk is {tensor.dtype} {list(tensor.shape)}, {METADATA} says otherwise")
        return tensor
