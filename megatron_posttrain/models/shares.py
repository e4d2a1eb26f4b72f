"""Refit: every rank receives its rollout engine's share of the weights, and little else.

What an engine's rank copies out of each Hugging Face tensor is a box of it (`Box`), or nothing: other experts. The
shards of the trainer are cut along those boxes. For each bucket of parameters and each rank of an engine the pieces, in
the order of the shards that have them, make one stream of bytes. The ranks of a node that want the same stream fetch
a part each from whoever holds it, in one all-to-all, and gather the parts inside the node: no byte comes to a node
twice, and a rank receives as many bytes as its engine's share has.
"""

import math
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate, zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_posttrain.models.disk_layout import DiskLayout
from megatron_posttrain.models.modules.nf4 import values
from megatron_posttrain.models.weights import TensorPlan
from megatron_posttrain.parallel.layout import Layout

Box = tuple[tuple[int, int], ...]  # [start, stop) by dimension
Wanted = dict[str, Box]  # by table name; what is not there is not wanted
KINDS = ("tensor", "whole", "expert")
ALIGNMENT = 16  # bytes; a view of bytes as a wider dtype has to start at a multiple of its size
BUCKET_BYTES = 1 << 30  # of a bucket, whole; one larger tensor makes a bucket by itself
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


def all_of(shape: Sequence[int]) -> Box:
    return tuple((0, size) for size in shape)


def bounds(one: Box, other: Box) -> Box:
    """The smallest box around both."""
    return tuple((min(a, c), max(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))


def inside(tensor: Tensor, box: Box) -> Tensor:
    return tensor[tuple(slice(start, stop) for start, stop in box)]


def digest(tensor: Tensor) -> Tensor:
    """int64 scalar: the sum of the bits of all elements, whatever their order or how they were cut."""
    return tensor.view(INTEGERS[tensor.itemsize]).sum()


def merged(weight: Tensor) -> Tensor:
    """A rank's shard of a weight, with its adapter's change."""
    adapter = getattr(weight, "adapter", None)
    return values(weight) if adapter is None or not adapter.enabled else adapter.merged()


@dataclass
class Slot:
    """A row of the weight table in one layer, with all its experts: what one pipeline stage owns."""

    plans: list[TensorPlan]
    local: list[Tensor] = field(default_factory=list)  # this rank's shards, by expert; empty on other stages
    dtype: torch.dtype = torch.float32
    whole: bool = False  # every tensor parallel rank has all of it
    stage: int = -1
    shape: tuple[int, ...] = ()  # of a shard

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"local": []}  # weights stay where they are

    @property
    def kind(self) -> str:
        if self.plans[0].expert is not None:
            return "expert"
        return "whole" if self.whole else "tensor"

    @property
    def nbytes(self) -> int:
        """Of a shard, padded."""
        return -(-math.prod(self.shape) * self.dtype.itemsize // ALIGNMENT) * ALIGNMENT


Unit = tuple[Slot, int]  # a tensor, or the experts that have one local number (0 without experts) on all ranks


@dataclass(frozen=True)
class Fragment:
    """A box of a Hugging Face tensor that lies in one shard of a parameter, at `local` there."""

    name: str
    box: Box
    local: Box
    nbytes: int  # in a stream, padded


def pieces(plan: TensorPlan, rank: int, size: int, wanted: Wanted, itemsize: int) -> Iterator[Fragment]:
    """What of shard `rank` of `size` is wanted."""
    dim, position = plan.mapping.dim, 0
    for source, start, stop in plan.mapping.segments(rank, size):
        box = None if source is None else wanted.get(plan.hf[source])
        if box is not None and source is not None:
            low, high = max(start, box[dim][0]), min(stop, box[dim][1])
            if low < high:
                cut = (*box[:dim], (low, high), *box[dim + 1 :])
                local = (*box[:dim], (low - start + position, high - start + position), *box[dim + 1 :])
                nbytes = math.prod(b - a for a, b in cut) * itemsize
                yield Fragment(plan.hf[source], cut, local, -(-nbytes // ALIGNMENT) * ALIGNMENT)
        position += stop - start


@dataclass
class Exchange:
    """Units of one kind, of any stages. Part (stage, shard) of the stream of engine rank p is `parts[p]`'s entry."""

    kind: str
    units: list[Unit] = field(default_factory=list)
    parts: list[dict[tuple[int, int], list[tuple[int, Fragment]]]] = field(default_factory=list)  # of which unit, what
    offsets: list[dict[tuple[int, int], tuple[int, int]]] = field(default_factory=list)  # [start, stop) in the stream

    def length(self, position: int) -> int:
        return max((stop for _, stop in self.offsets[position].values()), default=0)


class Schedule:
    """Who sends what to whom: it follows from the layout, the slots of the weight table and their stages, `node`, the
    ranks of a node, and what is wanted by engine ranks, one after the other, or by the first rank of each stage.
    `apart`: so many ranks follow the trainer's, and only they are engine ranks."""

    def __init__(
        self, slots: Sequence[Slot], layout: Layout, wanted: Sequence[Wanted], node: int, by_stage: bool = False,
        apart: int = 0,
    ) -> None:  # fmt: skip
        self.layout, self.node, self.engine, self.by_stage, self.apart = layout, node, len(wanted), by_stage, apart
        self.wanted = [*wanted, {}] if by_stage or apart else wanted
        self.ranks = {"tensor": 1, "whole": 1, "expert": layout.expert}  # with plans of their own
        self.shards = {"tensor": layout.tensor, "whole": 1, "expert": layout.expert * layout.expert_tensor}
        self.stage_ranks = layout.world_size // layout.pipeline
        self.block = math.lcm(layout.tensor * layout.context, self.shards["expert"])
        even = not by_stage and not apart and node % self.engine == layout.world_size % node == 0
        self.copies = node // self.engine if even else 1
        self.buckets = [self._cut(kind, units) for kind in KINDS for units in self._units(kind, slots)]

    def home(self, rank: int) -> int:
        """Which rank of a stage this is; of ranks apart, beside which one it is served, block after block."""
        if rank < self.layout.world_size:
            return rank % self.stage_ranks
        place, block = divmod(rank - self.layout.world_size, self.stage_ranks // self.block)
        return block * self.block + place % self.block

    def block_ranks(self, rank: int) -> list[int]:
        """The ranks around `rank` that hold the whole model together, as many neighbours of every stage, and those
        apart that they serve."""
        number, world = self.home(rank) // self.block, self.layout.world_size
        starts = range(number * self.block, world, self.stage_ranks)
        served = (guest for guest in range(world, world + self.apart) if self.home(guest) // self.block == number)
        return [*(start + i for start in starts for i in range(self.block)), *served]

    def node_ranks(self, rank: int) -> list[int]:
        """The ranks of a node that are the same rank of their engines."""
        first = rank // self.node * self.node + rank % self.engine if self.copies > 1 else rank
        return [first + self.engine * i for i in range(self.copies)]

    def position(self, rank: int) -> tuple[int, int]:
        """(rank of its engine, which part of the stream it fetches)."""
        if self.by_stage:
            stage, index = divmod(rank, self.stage_ranks)
            return self.engine if index else stage, 0
        if self.apart:
            return self.engine if rank < self.layout.world_size else (rank - self.layout.world_size) % self.engine, 0
        return rank % self.engine, self.node_ranks(rank).index(rank)

    def part(self, bucket: Exchange, position: int) -> int:
        """Bytes of the stream that each of a node's ranks fetches; the last one's may be fewer."""
        return -(-bucket.length(position) // (self.copies * ALIGNMENT)) * ALIGNMENT

    def overlap(self, bucket: Exchange, source: int, rank: int) -> tuple[int, int]:
        """[start, stop) of the stream of `rank` that `source`, of its block, sends it."""
        count, (position, part) = self.shards[bucket.kind], self.position(rank)
        stage, index = divmod(source, self.stage_ranks)
        turn = self.home(rank) % self.block % (self.block // count)  # ranks with the same shard share the work
        if index % self.block // count != turn:
            return 0, 0
        each = self.part(bucket, position)
        start, stop = bucket.offsets[position].get((stage, index % count), (0, 0))
        start, stop = max(start, part * each), min(stop, (part + 1) * each)
        return start, max(start, stop)

    def received(self, rank: int) -> int:
        """Bytes that come to a rank in a refit, from other ranks and from itself."""
        return sum(self.copies * self.part(bucket, self.position(rank)[0]) for bucket in self.buckets)

    def _units(self, kind: str, slots: Sequence[Slot]) -> Iterator[list[Unit]]:
        """Of a bucket each; all stages have their turn, so that all ranks send."""
        by_stage: dict[int, list[Slot]] = defaultdict(list)
        for slot in slots:
            if slot.kind == kind:
                by_stage[slot.stage].append(slot)
        turns = zip_longest(*(by_stage[stage] for stage in sorted(by_stage)))
        units: list[Unit] = []
        filled = 0
        for slot in (slot for turn in turns for slot in turn if slot is not None):
            for number in range(len(slot.plans) // self.ranks[kind]):
                nbytes = slot.nbytes * self.shards[kind]
                if units and filled + nbytes > BUCKET_BYTES:
                    yield units
                    units, filled = [], 0
                units.append((slot, number))
                filled += nbytes
        if units:
            yield units

    def _cut(self, kind: str, units: list[Unit]) -> Exchange:
        bucket = Exchange(kind, units)
        ranks = self.ranks[kind]
        split = self.shards[kind] // ranks
        for wanted in self.wanted:
            parts: dict[tuple[int, int], list[tuple[int, Fragment]]] = defaultdict(list)
            for unit, (slot, number) in enumerate(units):
                for shard in range(self.shards[kind]):
                    plan = slot.plans[shard // split * (len(slot.plans) // ranks) + number]
                    for piece in pieces(plan, shard % split, split, wanted, slot.dtype.itemsize):
                        parts[slot.stage, shard].append((unit, piece))
            keys = sorted(parts)
            ends = list(accumulate(sum(piece.nbytes for _, piece in parts[key]) for key in keys))
            bucket.parts.append(parts)
            bucket.offsets.append(dict(zip(keys, zip([0, *ends], ends, strict=False), strict=True)))
        return bucket


class Shares:
    """What ranks want of the model, as often as it is asked for, and whether it arrived. `slots`: of the weight table,
    `plans`, with this rank's shards; `disk`: of the Hugging Face directory; `wanted`, `by_stage`: see `Schedule`;
    `group`: of the trainer's ranks, followed by those of engines apart."""

    def __init__(
        self, slots: Sequence[Slot], plans: Iterable[TensorPlan], disk: DiskLayout, layout: Layout,
        wanted: Sequence[Wanted], device: torch.device, by_stage: bool = False, group: dist.ProcessGroup | None = None,
    ) -> None:  # fmt: skip
        self.disk, self.device, self.group = disk, device, group
        self.rank = dist.get_rank() if group is None else group.rank()
        self.world = dist.get_world_size(group)
        self.shapes = {name: shape for plan in plans for name, shape in plan.named_shapes()}
        node, apart = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), self.world - layout.world_size
        self.schedule = Schedule(slots, layout, wanted, node, by_stage, apart)
        self.position = self.schedule.position(self.rank)[0]
        self.wanted = self.schedule.wanted[self.position]
        self.numbers = {name: number for number, name in enumerate(self.shapes)}
        # Bytes of a refit, to this rank or to each that is apart
        self.received = self.schedule.received(layout.world_size if apart else self.rank)
        self._sums: list[tuple[int, int, Tensor]] | None = None
        self._arrived: dict[str, Tensor] = {}

    def hf_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """As `tensors`, under the names on disk."""
        return self.disk.assemble(self.tensors())

    @torch.no_grad()
    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Collective: the tensors of which this rank wants something, in their whole shapes; only what is inside their
        boxes is set."""
        for bucket in self.schedule.buckets:
            yield from self._exchange(bucket)

    def noted(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """`hf_tensors` as they go into an engine, and what is summed for `problem`."""
        self._sums, self._arrived = [], {}
        for stored, tensor in tensors:
            for name in self.disk.table_names[stored]:
                if name in self.wanted:
                    self._arrived[name] = digest(inside(self.disk.places[name].view(tensor), self.wanted[name]))
            yield stored, tensor

    @torch.no_grad()
    def problem(self) -> str | None:
        """Collective, after a refit: what went into the engine is not what the trainer's ranks hold; None where it is.
        Every rank that owns a shard sums the bits of what it is to send, and whoever receives those of what it got."""
        sums = torch.zeros(self.schedule.engine, len(self.numbers), dtype=torch.int64, device=self.device)
        if self._sums:
            rows, columns, values = zip(*self._sums, strict=True)
            where = tuple(torch.tensor(index, device=self.device) for index in (rows, columns))
            sums.index_put_(where, torch.stack(values), accumulate=True)
        dist.all_reduce(sums, group=self.group)
        self._sums = None
        if not self.wanted:
            return None
        sent, names = sums[self.position].tolist(), list(self._arrived)
        got = dict(zip(names, torch.stack(list(self._arrived.values())).tolist(), strict=True)) if names else {}
        wrong = [name for name in self.wanted if got.get(name) != sent[self.numbers[name]]]
        if not wrong:
            return None
        what = "did not come" if wrong[0] not in got else "is not what the trainer holds"
        return f"'{wrong[0]}' {what} (digests of {len(wrong)} of {len(self.wanted)} tensors differ)"

    def _exchange(self, bucket: Exchange) -> Iterable[tuple[str, Tensor]]:
        schedule = self.schedule
        stage, index = divmod(self.rank, schedule.stage_ranks)
        key = (stage, index % schedule.shards[bucket.kind])
        own: list[Any] = [merged(slot.local[number]) if slot.stage == stage else None for slot, number in bucket.units]
        if self._sums is not None and index < schedule.shards[bucket.kind]:  # of the ranks with the shard the first one
            for position, parts in enumerate(bucket.parts):
                for unit, piece in parts.get(key, ()):
                    found = digest(inside(own[unit], piece.local))
                    self._sums.append((position, self.numbers[piece.name], found))
        pack = cache(lambda position: self._pack(bucket.parts[position][key], own))
        slices = [torch.empty(0, dtype=torch.uint8, device=self.device)]
        sent, received = [0] * self.world, [0] * self.world
        for rank in schedule.block_ranks(self.rank):
            start, stop = schedule.overlap(bucket, self.rank, rank)
            if start < stop:
                position = schedule.position(rank)[0]
                first = bucket.offsets[position][key][0]
                slices.append(pack(position)[start - first : stop - first])
            sent[rank] = stop - start
            start, stop = schedule.overlap(bucket, rank, self.rank)
            received[rank] = stop - start
        stream = slices[0].new_empty(schedule.part(bucket, self.position))
        dist.all_to_all_single(stream[: sum(received)], torch.cat(slices), received, sent, group=self.group)
        if schedule.copies > 1:  # of a node each has fetched a part for all
            near = schedule.node_ranks(self.rank)
            lengths = [len(stream) * (rank in near) for rank in range(self.world)]
            part, stream = stream, stream.new_empty(schedule.copies * len(stream))
            dist.all_to_all_single(stream, part.repeat(schedule.copies), lengths, lengths)
        return self._unpack(bucket, stream)

    def _pack(self, parts: Sequence[tuple[int, Fragment]], own: Sequence[Any]) -> Tensor:
        flat = torch.empty(sum(piece.nbytes for _, piece in parts), dtype=torch.uint8, device=self.device)
        at = 0
        for unit, piece in parts:
            _view(flat[at:], piece, own[unit].dtype).copy_(inside(own[unit], piece.local))
            at += piece.nbytes
        return flat

    def _unpack(self, bucket: Exchange, stream: Tensor) -> Iterable[tuple[str, Tensor]]:
        found: dict[str, Tensor] = {}
        at = 0
        for key in bucket.offsets[self.position]:
            for unit, piece in bucket.parts[self.position][key]:
                name, shape, dtype = piece.name, self.shapes[piece.name], bucket.units[unit][0].dtype
                data = _view(stream[at:], piece, dtype)
                at += piece.nbytes
                if data.shape == shape:
                    found[name] = data
                    continue
                if name not in found:
                    found[name] = torch.empty(shape, dtype=dtype, device=self.device)
                inside(found[name], piece.box).copy_(data)
        return found.items()


def _view(flat: Tensor, piece: Fragment, dtype: torch.dtype) -> Tensor:
    shape = [stop - start for start, stop in piece.box]
    return flat[: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
