"""How a Hugging Face directory arranges the tensors of the weight table.

The tables name one tensor per expert and projection. Newer `transformers` can also write one 3-D tensor
for all experts of a layer; a family lists those as `Fusion`s. A `DiskLayout` turns the names of the table
into places inside the tensors on disk, the same way for reading and for writing.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_posttrain.models.weights import Read, Shape, TensorPlan, numbered


@dataclass(frozen=True)
class Fusion:
    """One tensor on disk that holds `parts` of the table, for every expert where they have experts. Of parts [out, in]
    it is [experts, parts * out, in], the parts one after the other; `interleaved`: row by row in turns; `transposed`:
    [experts, in, parts * out]."""

    hf: str
    parts: tuple[str, ...]
    interleaved: bool = False
    transposed: bool = False

    def shape(self, part: Shape, experts: int | None) -> Shape:
        whole = (part[0] * len(self.parts), *part[1:])
        whole = whole[::-1] if self.transposed else whole
        return whole if experts is None else (experts, *whole)


class Place(NamedTuple):
    """Where a tensor of the table lies inside the tensor `name` on disk."""

    name: str
    fusion: Fusion | None = None
    part: int = 0
    expert: int | None = None

    def view(self, tensor: Any) -> Any:
        """The table's tensor as a view of `tensor`, the one on disk."""
        if self.fusion is None:
            return tensor
        if self.expert is not None:
            tensor = tensor[self.expert]
        if self.fusion.transposed:
            tensor = tensor.transpose(0, -1)
        count = len(self.fusion.parts)
        if self.fusion.interleaved:
            return tensor[self.part :: count]
        rows = tensor.shape[0] // count
        return tensor[self.part * rows : (self.part + 1) * rows]


class DiskLayout:
    """The tensors on disk: `shapes` by name, in the order of the model, and `dtypes` where fixed."""

    def __init__(self, plans: Iterable[TensorPlan], fusions: Sequence[Fusion] = ()) -> None:
        self.fusions = fusions
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.places: dict[str, Place] = {}
        self.copies: dict[str, tuple[str, ...]] = {}
        by_part = {part: (fusion, number) for fusion in fusions for number, part in enumerate(fusion.parts)}
        for plan in plans:
            mapping = plan.mapping
            for pattern, name, shape in zip(mapping.hf, plan.hf, mapping.shapes, strict=True):
                place = Place(name)
                if pattern in by_part:
                    fusion, part = by_part[pattern]
                    layer = None if plan.layer is None else plan.layer + mapping.hf_layer_offset
                    place = Place(numbered(fusion.hf, layer, None), fusion, part, plan.expert)
                    shape = fusion.shape(shape, mapping.experts)
                self.places[name] = place
                for stored in (place.name, *mapping.copies):
                    self.shapes[stored] = shape
                    if mapping.dtype is not None:
                        self.dtypes[stored] = mapping.dtype
            if mapping.copies:
                self.copies[plan.hf[0]] = mapping.copies
        self.table_names: dict[str, list[str]] = {}  # of what a tensor on disk consists, by expert and then by part
        for name, place in self.places.items():
            self.table_names.setdefault(place.name, []).append(name)
        for name, copies in self.copies.items():
            self.table_names |= {copy: [name] for copy in copies}
        for names in self.table_names.values():
            names.sort(key=lambda name: (self.places[name].expert or 0, self.places[name].part))

    @property
    def fused(self) -> bool:
        return any(place.fusion is not None for place in self.places.values())

    def reader(self, get: Callable[[str], Any]) -> Read:
        """Reads the table's tensors through `get`, which gives those on disk (lazily)."""

        def read(name: str) -> Any:
            place = self.places[name]
            return place.view(get(place.name))

        return read

    def blocks(self, stored: str, parts: Callable[[str], Iterable[Tensor]]) -> Iterator[Tensor]:
        """The tensor `stored` on disk as blocks that follow each other in memory. `parts(name)` gives a tensor of the
        table as parts, one below the other. Holds one expert at most."""
        for _, group in groupby(self.table_names[stored], key=lambda name: self.places[name].expert):
            names = list(group)
            fusion = self.places[names[0]].fusion
            if fusion is None or not (fusion.interleaved or fusion.transposed):
                for name in names:
                    yield from parts(name)
                continue
            whole = [torch.cat(list(parts(name))) for name in names]
            block = torch.empty(fusion.shape(tuple(whole[0].shape), None), dtype=whole[0].dtype)
            for name, tensor in zip(names, whole, strict=True):
                self.places[name]._replace(expert=None).view(block).copy_(tensor)
            yield block

    def assemble(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The tensors on disk from the table's, which come in any order; those on disk pass as they are. Holds the
        fused tensors that are not yet complete, and nothing else."""
        pending: dict[str, Tensor] = {}
        left: dict[str, int] = {}
        for name, tensor in tensors:
            if name not in self.places and name in self.shapes:
                yield name, tensor
                continue
            place = self.places[name]
            if place.fusion is None:
                yield place.name, tensor
                for copy in self.copies.get(name, ()):
                    yield copy, tensor
                continue
            if place.name not in pending:
                shape = self.shapes[place.name]
                pending[place.name] = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
                left[place.name] = len(place.fusion.parts) * (1 if place.expert is None else shape[0])
            place.view(pending[place.name]).copy_(tensor)
            left[place.name] -= 1
            if not left[place.name]:
                yield place.name, pending.pop(place.name)
        if pending:
            raise ValueError(f"incomplete fused tensors: {', '.join(sorted(pending))}")
