"""Two checkpoints, tensor by tensor, Hugging Face or Megatron, one tensor in memory at a time."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_posttrain.checkpoint import megatron
from megatron_posttrain.checkpoint.convert import side_files
from megatron_posttrain.checkpoint.distcp import METADATA, DistcpReader
from megatron_posttrain.checkpoint.hf import HEAD, directory_layout, is_tied_copy, table_reader
from megatron_posttrain.checkpoint.hf_files import HfReader, read_json
from megatron_posttrain.models import fp8, registry
from megatron_posttrain.models.weights import Shape, unmerged

STEP = 1 << 24  # elements compared at a time


class Tensors(NamedTuple):
    """One side: names with dtype and shape, and the tensor as parts, one below the other."""

    kinds: dict[str, tuple[torch.dtype, Shape]]
    parts: Callable[[str], Iterator[Tensor]]


@dataclass(frozen=True)
class Difference:
    name: str
    kind: str  # missing in A, missing in B, shape, dtype, values
    detail: str = ""
    largest: float = 0.0  # absolute difference


def compare(a: Path, b: Path, tolerance: float | None = None, source: Path | None = None) -> Iterator[Difference | str]:
    """The differences, and the names of tensors that are equal, in the order of `a`. Equal means the same dtype and
    bits; with a `tolerance`, values (as float64) that differ by no more, NaN equal to NaN. `source`: the Hugging Face
    directory of a Megatron checkpoint that has none of its own."""
    left, right = _sides(a, b, source)
    for name in dict.fromkeys([*left.kinds, *right.kinds]):
        if name not in left.kinds or name not in right.kinds:
            yield Difference(name, "missing in A" if name not in left.kinds else "missing in B")
            continue
        (kind_a, shape_a), (kind_b, shape_b) = left.kinds[name], right.kinds[name]
        if shape_a != shape_b:
            yield Difference(name, "shape", f"{list(shape_a)} and {list(shape_b)}", math.inf)
        elif kind_a != kind_b and tolerance is None:
            yield Difference(name, "dtype", f"{kind_a} and {kind_b}".replace("torch.", ""))
        else:
            yield _values(name, left.parts(name), right.parts(name), tolerance) or name


def _values(name: str, a: Iterator[Tensor], b: Iterator[Tensor], tolerance: float | None) -> Difference | None:
    count, first, largest, position = 0, -1, 0.0, 0
    for x, y in _aligned(a, b):
        if tolerance is None:
            differing = (x.view(torch.uint8) != y.view(torch.uint8)).view(-1, x.element_size()).any(1)
            if not differing.any():
                position += len(x)
                continue
        distance = (x.double() - y.double()).abs()
        distance[x.isnan() & y.isnan() | (x == y)] = 0.0
        distance[distance.isnan()] = math.inf
        if tolerance is not None:
            differing = distance > tolerance
        if differing.any():
            first = position + int(differing.nonzero()[0]) if first < 0 else first
            count += int(differing.sum())
            largest = max(largest, float(distance.max()))
        position += len(x)
    if not count:
        return None
    return Difference(name, "values", f"{count} of {position} elements, the first is number {first}", largest)


def _aligned(a: Iterator[Tensor], b: Iterator[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of equally long flat pieces of two tensors that come in parts."""
    pieces_a, pieces_b = _pieces(a), _pieces(b)
    x, y = next(pieces_a, None), next(pieces_b, None)
    while x is not None and y is not None:
        length = min(len(x), len(y))
        yield x[:length], y[:length]
        x = x[length:] if length < len(x) else next(pieces_a, None)
        y = y[length:] if length < len(y) else next(pieces_b, None)


def _pieces(parts: Iterator[Tensor]) -> Iterator[Tensor]:
    for part in parts:
        flat = part.contiguous().view(-1)
        for piece in flat.split(STEP):
            yield piece.float() if piece.dtype == fp8.DTYPE else piece


def is_megatron(directory: Path) -> bool:
    return (directory / METADATA).exists()


def _sides(a: Path, b: Path, source: Path | None) -> tuple[Tensors, Tensors]:
    """Both under the same names: those on disk where the kinds agree, else those of the weight table."""
    if is_megatron(a) and is_megatron(b):
        return _stored(a), _stored(b)
    if not is_megatron(a) and not is_megatron(b):
        left, right = HfReader(a), HfReader(b)
        if left.fp8_block == right.fp8_block and _has_3d(left) == _has_3d(right):
            return _on_disk(left), _on_disk(right)
    return tuple(_of_model(side, source) for side in (a, b))  # type: ignore[return-value]


def _has_3d(reader: HfReader) -> bool:
    """As fused experts are."""
    return any(len(reader.entry(name).shape) == 3 for name in reader.names())


def _on_disk(reader: HfReader) -> Tensors:
    config = reader.directory / "config.json"
    tied = config.exists() and read_json(config).get("tie_word_embeddings") and is_tied_copy(reader)
    names = [name for name in reader.names() if not (tied and name == HEAD)]  # the model is the same without it
    kinds = {name: (reader.dtype(name), reader.entry(name).shape) for name in names}
    return Tensors(kinds, lambda name: iter([reader.get_slice(name)]))


def _stored(directory: Path) -> Tensors:
    reader = DistcpReader(directory)
    keys = {unmerged(key): key for key in reader.tensors}
    kinds = {name: (reader.tensors[key].dtype, reader.tensors[key].shape) for name, key in keys.items()}

    def parts(name: str) -> Iterator[Tensor]:
        shape = kinds[name][1]
        if len(shape) < 3:  # a layer or an expert at a time where there is an axis of them
            yield reader.get(keys[name])
            return
        for index in range(shape[0]):
            yield reader.get(keys[name], (index,))

    return Tensors(kinds, parts)


def _of_model(directory: Path, source: Path | None) -> Tensors:
    """The tensors of the weight table, under their Hugging Face names, experts one by one."""
    home = side_files(directory, source) if is_megatron(directory) else directory
    keep_mtp = home in (directory, directory / megatron.HF_FILES)
    arch = registry.architecture_from_hf(read_json(home / "config.json"), keep_mtp=keep_mtp)
    if is_megatron(directory):
        stored = megatron.MegatronReader(directory, arch)
        shapes = registry.shapes(arch).items()
        return Tensors({name: (stored.hf_dtype(name), shape) for name, shape in shapes}, stored.parts)
    reader = HfReader(directory)
    layout, read = directory_layout(reader, arch), table_reader(reader, arch)
    kinds: dict[str, tuple[torch.dtype, Shape]] = {}
    for name, shape in registry.shapes(arch).items():
        if layout.places[name].name in reader.names():
            kinds[name] = (reader.plain_dtype(layout.places[name].name), shape)
    for name in sorted(set(reader.names()) - set(layout.shapes)):
        scale = name.endswith(fp8.SUFFIX) and reader.fp8_block is not None
        other_head = name == HEAD and not is_tied_copy(reader)
        if not scale and (other_head or not registry.is_ignored(arch, name)):
            kinds[name] = (reader.dtype(name), reader.entry(name).shape)

    def parts(name: str) -> Iterator[Tensor]:
        yield read(name)[:] if name in layout.places else reader.get_slice(name)

    return Tensors(kinds, parts)
