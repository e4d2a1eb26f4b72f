"""Two-way weight mappings: a Megatron parameter on the left, Hugging Face tensors on the right.

A mapping says of which slices of which Hugging Face tensors one tensor-parallel shard consists (`segments`); reading
(`fill`) and writing (`parts`) both follow from that one description. Megatron names are those of megatron-core's local
layer spec with one module per expert; `*` stands for the layer number, then for the expert number, global and from 0.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

Shape = tuple[int, ...]
Read = Callable[[str], Any]  # Hugging Face name -> tensor, or anything that is sliced like one


# Transformer Engine merges a norm into the linear layer that follows it: the table's name, and the merged one
MERGED_NORMS = (
    ("input_layernorm.", "self_attention.linear_qkv.layer_norm_"),
    ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"),
    ("q_layernorm.", "linear_q_up_proj.layer_norm_"),
    ("kv_layernorm.", "linear_kv_up_proj.layer_norm_"),
)


def unmerged(name: str) -> str:
    """The table's name of a norm, whatever the layer implementation calls it."""
    for ours, merged in MERGED_NORMS:
        name = name.replace(merged, ours)
    return name


class Segment(NamedTuple):
    """[start, stop) of Hugging Face tensor number `source` along the split dimension; None: zeros."""

    source: int | None
    start: int
    stop: int


def even_range(length: int, rank: int, size: int) -> tuple[int, int]:
    """[start, stop) of part `rank` of `length` cut in `size` equal parts."""
    if length % size:
        raise ValueError(f"{length} is not divisible by a tensor-parallel size of {size}")
    return rank * length // size, (rank + 1) * length // size


def padded_vocab_size(vocab_size: int, tensor_size: int) -> int:
    """The vocabulary with the zero rows that tensor parallelism needs, a multiple of `tensor_size`."""
    return -(-vocab_size // tensor_size) * tensor_size


@dataclass(frozen=True)
class Mapping:
    """One Megatron parameter (per layer and expert) and the Hugging Face tensors that it is made of."""

    megatron: str
    hf: tuple[str, ...]
    shapes: tuple[Shape, ...]  # of the Hugging Face tensors
    layers: tuple[int, ...] | None = None  # the layers that have it; None: it is not in a layer
    experts: int | None = None
    hf_layer_offset: int = 0
    dtype: torch.dtype | None = None  # on disk, where it is not the model's
    copies: tuple[str, ...] = ()  # further Hugging Face names under which the (only) tensor is stored
    dim: ClassVar[int] = 0

    def segments(self, rank: int, size: int) -> list[Segment]:
        raise TypeError(f"{type(self).__name__} does not say how it is split")

    def local_shape(self, size: int) -> Shape:
        """Shape of one shard of `size`."""
        shape = list(self.shapes[0])
        shape[self.dim] = sum(segment.stop - segment.start for segment in self.segments(0, size))
        return tuple(shape)


class Replicated(Mapping):
    """The same on every tensor-parallel rank; several tensors lie one below the other."""

    def segments(self, rank: int, size: int) -> list[Segment]:
        return [Segment(source, 0, shape[0]) for source, shape in enumerate(self.shapes)]


class ColumnParallel(Mapping):
    """Output features (dimension 0) split over tensor parallelism."""

    def segments(self, rank: int, size: int) -> list[Segment]:
        return [Segment(0, *even_range(self.shapes[0][self.dim], rank, size))]


class RowParallel(ColumnParallel):
    """Input features (dimension 1) split over tensor parallelism."""

    dim = 1


class Vocabulary(Mapping):
    """Rows of the vocabulary split over tensor parallelism, after padding with zero rows."""

    def segments(self, rank: int, size: int) -> list[Segment]:
        rows = self.shapes[0][0]
        start, stop = even_range(padded_vocab_size(rows, size), rank, size)
        real = Segment(0, min(start, rows), min(stop, rows))
        return [real, Segment(None, 0, stop - start - (real.stop - real.start))]


class GatedMLP(Mapping):
    """Gate and up projections: every shard is its slice of the gate above its slice of the up."""

    def segments(self, rank: int, size: int) -> list[Segment]:
        start, stop = even_range(self.shapes[0][0], rank, size)
        return [Segment(0, start, stop), Segment(1, start, stop)]


@dataclass(frozen=True)
class QKV(Mapping):
    """Query, key and value, interleaved by query group: [its query heads, its key, its value]. A shard is an equal
    share of those rows. With fewer groups than shards a group is cut, and megatron-core gathers it before attention."""

    groups: int = 1

    def segments(self, rank: int, size: int) -> list[Segment]:
        widths = [shape[0] // self.groups for shape in self.shapes]
        start, stop = even_range(sum(shape[0] for shape in self.shapes), rank, size)
        segments, position = [], 0
        for group in range(self.groups):
            for source, width in enumerate(widths):
                low, high = max(start, position), min(stop, position + width)
                if low < high:
                    shift = group * width - position
                    segments.append(Segment(source, low + shift, high + shift))
                position += width
        return segments


@dataclass(frozen=True)
class TensorPlan:
    """One global Megatron tensor: a mapping with its layer and expert filled in."""

    name: str
    mapping: Mapping
    hf: tuple[str, ...]
    layer: int | None
    expert: int | None

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Of the Hugging Face tensors."""
        return self.mapping.shapes

    def named_shapes(self) -> Iterator[tuple[str, Shape]]:
        """Of the Hugging Face tensors, with their names."""
        return zip(self.hf, self.shapes, strict=True)

    def local_shape(self, size: int) -> Shape:
        return self.mapping.local_shape(size)

    def fill(self, out: Tensor, read: Read, rank: int, size: int) -> None:
        """Write shard `rank` of `size` into `out`, reading only the slices that it is made of."""
        dim, position = self.mapping.dim, 0
        for source, start, stop in self.mapping.segments(rank, size):
            target = out.narrow(dim, position, stop - start)
            position += stop - start
            if source is None:
                target.zero_()
            elif start < stop:
                tensor = read(self.hf[source])
                target.copy_(tensor[start:stop] if dim == 0 else tensor[:, start:stop])

    def rows(self, read: Read, start: int, stop: int) -> Iterator[Tensor]:
        """Rows [start, stop) of the whole tensor, as parts of its sources, one below the other."""
        if self.mapping.dim == 1:
            yield read(self.hf[0])[start:stop]
            return
        position = 0
        for source, low, high in self.mapping.segments(0, 1):
            first, last = max(start, position), min(stop, position + high - low)
            if source is not None and first < last:
                yield read(self.hf[source])[first - position + low : last - position + low]
            position += high - low

    def parts(self, tensor: Tensor, source: int) -> Iterator[Tensor]:
        """Hugging Face tensor number `source`, as parts of the whole `tensor`, one below the other."""
        if self.mapping.dim == 1:
            yield tensor
            return
        position = 0
        for number, low, high in self.mapping.segments(0, 1):
            if number == source and low < high:
                yield tensor[position : position + high - low]
            position += high - low


def on(layers: Sequence[int], mappings: Sequence[Mapping], **changes: Any) -> list[Mapping]:
    """`mappings` for `layers` (global numbers from 0), with further fields changed."""
    return [replace(mapping, layers=tuple(layers), **changes) for mapping in mappings] if layers else []


def numbered(name: str, layer: int | None, expert: int | None) -> str:
    """`name` with its first `*` replaced by the layer number and its second by the expert number."""
    for number in (layer, expert):
        if number is not None:
            name = name.replace("*", str(number), 1)
    return name


def expand(table: Sequence[Mapping]) -> Iterator[TensorPlan]:
    """Every global tensor of a table in the order of the model: by layer, then as the table has it."""
    by_position: dict[int, list[tuple[Mapping, int | None]]] = {}
    outside = -1  # what is in no layer: before all layers, and once a layer was seen after them
    for mapping in table:
        for layer in mapping.layers or (None,):
            position = outside if layer is None else layer + mapping.hf_layer_offset
            by_position.setdefault(position, []).append((mapping, layer))
            outside = outside if layer is None else 1 << 30
    for position in sorted(by_position):
        for mapping, layer in by_position[position]:
            experts: Sequence[int | None] = range(mapping.experts) if mapping.experts else (None,)
            for expert in experts:
                names = tuple(numbered(pattern, position, expert) for pattern in mapping.hf)
                yield TensorPlan(numbered(mapping.megatron, layer, expert), mapping, names, layer, expert)
