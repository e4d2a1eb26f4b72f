"""Weights and optimizer states in checkpoints: every data parallel rank writes and reads one stretch of its shard.

megatron-core 0.16.1's `fully_reshardable` gathers a shard's fp32 weights and moments whole on every data parallel
rank and writes what one of them has. Here the same tensors, under the same names, are written in pieces. The
optimizer holds a part of every bucket of the shard; one all-to-all a bucket turns that into one contiguous stretch
a rank, so that a parameter is cut only where two ranks' stretches meet, and a checkpoint has few pieces however many
ranks there are. Host memory is 12 bytes a parameter for states and the weights' own, of 1 / ranks of the shard.

Pieces are boxes of the global tensors, which any layout reads, stock megatron-core too; checkpoints that it wrote
itself are read the same way.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_posttrain.platform.scope import replaced

STATES = ("param", "exp_avg", "exp_avg_sq")
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """A box of a parameter: its flat elements from `first` on, which lie at `start` of a bucket's in the stretch."""

    param: Any
    first: int
    start: int
    sharded: Any  # megatron-core's ShardedTensor, without data

    def of(self, flat: Tensor, start: int) -> Tensor:
        return flat[start : start + math.prod(self.sharded.local_shape)].view(self.sharded.local_shape)


class Bucket:
    """One of megatron-core's buckets, of `optimizer`: what of it is in this rank's part, and in its stretch."""

    def __init__(self, optimizer: Any, prefix: str, buffer: Any, index: int, ranges: dict[Any, Any]) -> None:
        self.optimizer, self.prefix, self.group = optimizer, prefix, buffer.data_parallel_group
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.offset, self.numel = buffer.buckets[index].offset, buffer.buckets[index].grad_data.numel()
        self.ranges, self.device = ranges, buffer.buckets[index].grad_data.device
        self.stretch = buffer.numel // self.size
        self.first = max(self.rank * self.stretch, self.offset)
        self.end = max(self.first, min((self.rank + 1) * self.stretch, self.offset + self.numel))
        self.pieces: list[Piece] = []

    def add(self, param: Any, start: int, stop: int, base: Any) -> None:
        """A parameter that lies at [start, stop) of the buffer; `base`: its place in the model's global tensors."""
        first, end = max(start, self.first), min(stop, self.end)
        for inside, sharded in boxes_of(base, first - start, end - start) if first < end else ():
            self.pieces.append(Piece(param, inside, start + inside - self.first, sharded))

    def exchange(self, flat: Tensor, *, back: bool = False) -> Tensor:
        """Collective: this rank's part of the bucket -> the bucket's elements of its stretch; `back`: the reverse."""
        if self.size == 1:
            return flat
        each = self.numel // self.size

        def common(part: int, stretch: int) -> int:
            start = self.offset + part * each
            end = min(start + each, (stretch + 1) * self.stretch)
            return max(0, end - max(start, stretch * self.stretch))

        send = [common(self.rank, other) for other in range(self.size)]
        receive = [common(other, self.rank) for other in range(self.size)]
        send, receive = (receive, send) if back else (send, receive)
        out = flat.new_empty(sum(receive))
        dist.all_to_all_single(out, flat, receive, send, group=self.group)
        return out

    def part(self, state: str) -> Tensor:
        """[numel / ranks] this rank's part of an optimizer state."""
        flat = torch.zeros(self.numel // self.size, dtype=torch.float32, device=self.device)
        for param, where in self.ranges.items():
            local = where["gbuf_local"]
            flat[local.start : local.end].copy_(self.optimizer._get_main_param_and_optimizer_states(param)[state])
        return flat

    def named(self, piece: Piece, state: str, data: Tensor) -> Any:
        key = f"{self.prefix}optimizer.state.{state}.{piece.sharded.key}"
        return replace(piece.sharded, key=key, dtype=data.dtype, data=data)


class Stretches:
    """Of all parameters that an optimizer, megatron-core's ChainedOptimizer of DistributedOptimizers, trains. `model`:
    the chunks' sharded state dicts, with parameters as they are (`keep_vars`); `states`: of a parameter, by the
    optimizer's names; `param`: the main weight."""

    def __init__(self, optimizer: Any, model: Sequence[dict[str, Any]], states: Sequence[str] = STATES) -> None:
        self.states = states
        bases = {id(entry.data): entry for chunk in model for entry in chunk.values() if hasattr(entry, "data")}
        chained = optimizer.chained_optimizers
        self.optimizers, self.buckets, self.loaded = chained, [], []  # type: ignore[var-annotated]
        self.trained: set[int] = set()
        for number, part in enumerate(chained):
            prefix = f"chained_{number}." if len(chained) > 1 else ""
            for buffer, by_dtype in zip(part.buffers, part.gbuf_ranges, strict=True):
                (ranges,) = by_dtype.values()
                own = [Bucket(part, prefix, buffer, i, r["param_map"]) for i, r in enumerate(ranges)]
                for param, (start, stop, index) in buffer.param_index_map.items():
                    self.trained.add(id(param))
                    own[index].add(param, start, stop, bases[id(param)])
                self.buckets += own

    def without_trained(self, chunk: dict[str, Any]) -> dict[str, Any]:
        """A model chunk's entries but for the parameters that are here."""
        return {key: entry for key, entry in chunk.items() if id(getattr(entry, "data", None)) not in self.trained}

    @torch.no_grad()
    def to_save(self) -> list[Any]:
        """Collective: this rank's pieces of optimizer states and weights, in host memory of their own."""
        found = []
        for bucket in self.buckets:
            written = [piece for piece in bucket.pieces if not any(piece.sharded.replica_id)]
            for state in self.states:
                flat = bucket.exchange(bucket.part(state))
                for piece in written:
                    found.append(bucket.named(piece, state, piece.of(flat, piece.start).to("cpu", copy=True)))
                del flat
            for piece in written:
                data = piece.of(piece.param.detach().view(-1), piece.first).to("cpu", copy=True)
                found.append(replace(piece.sharded, dtype=data.dtype, data=data))
        return found

    def to_load(self) -> list[Any]:
        """Room in host memory for this rank's pieces of optimizer states; `restore` puts them where they belong."""
        self.loaded = [
            [
                [bucket.named(piece, state, torch.empty(piece.sharded.local_shape)) for piece in bucket.pieces]
                for state in self.states
            ]
            for bucket in self.buckets
        ]
        return [sharded for bucket in self.loaded for state in bucket for sharded in state]

    @torch.no_grad()
    def restore(self) -> None:
        """Collective: what was loaded into the optimizer, and its weights into the model of this rank: the other
        ranks' weights are to be gathered."""
        for bucket, states in zip(self.buckets, self.loaded, strict=True):
            parts = {}
            for name, pieces in zip(self.states, states, strict=True):
                flat = torch.zeros(bucket.end - bucket.first, device=bucket.device)
                for piece, sharded in zip(bucket.pieces, pieces, strict=True):
                    piece.of(flat, piece.start).copy_(sharded.data)
                parts[name] = bucket.exchange(flat, back=True)
            states.clear()
            for param, where in bucket.ranges.items():
                local = where["gbuf_local"]
                tensors = {name: part[local.start : local.end] for name, part in parts.items()}
                bucket.optimizer._set_main_param_and_optimizer_states(param, tensors)
        for optimizer in self.optimizers:
            optimizer._copy_main_params_to_model_params()


def boxes_of(base: Any, start: int, stop: int) -> Iterator[tuple[int, Any]]:
    """Elements [start, stop) of a parameter as (first element, box of the global tensor). `base`: megatron-core's
    ShardedTensor of the parameter, or its ShardedTensorFactory of several parts."""
    for part in base.build() if hasattr(base, "build") else [base]:
        begin = part.data.storage_offset() - base.data.storage_offset()
        if not part.data.is_contiguous():
            raise ValueError(f"{part.key}: its part of a parameter is not contiguous")
        first, end = max(start, begin), min(stop, begin + part.data.numel())
        leading = (0,) * part.prepend_axis_num
        for offsets, shape in boxes(part.local_shape, first - begin, end - begin) if first < end else ():
            yield (
                first,
                replace(
                    part,
                    data=None,
                    local_shape=(1,) * len(leading) + shape,
                    global_offset=tuple(map(sum, zip(part.global_offset, leading + offsets, strict=True))),
                    axis_fragmentations=None,  # no regular grid
                    prepend_axis_num=0,
                    replica_id=(*part.replica_id[:2], 0),  # (pipeline, tensor, data): one of data parallel ranks has it
                ),
            )
            first += math.prod(shape)


def boxes(shape: Shape, start: int, stop: int) -> Iterator[tuple[Shape, Shape]]:
    """(offsets, shape) of the boxes that elements [start, stop) of a row-major tensor are, in their order."""
    if len(shape) <= 1:
        yield ((start,), (stop - start,)) if shape else ((), ())
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows

    def within(number: int, begin: int, end: int) -> Iterator[tuple[Shape, Shape]]:
        for offsets, part in boxes(shape[1:], begin - number * row, end - number * row):
            yield (number, *offsets), (1, *part)

    if first > last:
        yield from within(last, start, stop)
        return
    if start < first * row:
        yield from within(first - 1, start, first * row)
    if first < last:
        yield (first, *(0,) * len(shape[1:])), (last - first, *shape[1:])
    if last * row < stop:
        yield from within(last, last * row, stop)


def without_gathered_states() -> contextlib.AbstractContextManager[None]:
    """Scope in which megatron-core's optimizers make no parameter states of their own."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    replacements = [
        (DistributedOptimizer, "sharded_param_state_fully_reshardable", lambda self, *args: {}),
        (DistributedOptimizer, "load_parameter_state_from_fully_reshardable", lambda self, state: None),
    ]
    return replaced(replacements)
