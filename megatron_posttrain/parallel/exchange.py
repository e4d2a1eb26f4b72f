"""Collectives on arrays of the host, over all ranks, whatever the device that the backend sends from."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_posttrain.platform import platform

Value = TypeVar("Value")


def gather_rows(values: Tensor) -> Tensor:
    """[...] of one shape on every rank -> [world, ...] on every rank."""
    mine = values.to(platform().device).contiguous()
    rows = mine.new_empty(dist.get_world_size(), *mine.shape)
    dist.all_gather(list(rows), mine)
    return rows.cpu()


def summed(own: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Over the ranks of `group`, or all of them."""
    everywhere = own.to(platform().device, copy=True)
    dist.all_reduce(everywhere, group=group)
    return everywhere.cpu()


def gathered(own: Value, group: dist.ProcessGroup | None = None) -> list[Value]:
    """What each rank of `group`, or of all, gives, on every one of them."""
    found = [own] * dist.get_world_size(group)
    dist.all_gather_object(found, own, group=group)
    return found


def exchange(flat: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
    """All-to-all of parts of flat tensors: `sent[r]` entries go to rank r, `received[r]` come from it, in order."""
    if dist.get_world_size() == 1:
        return flat
    device = platform().device
    arrived = torch.empty(sum(received), dtype=flat.dtype, device=device)
    dist.all_to_all_single(arrived, flat.to(device), list(received), list(sent))
    return arrived.cpu()


def to_first_rank(own: bytearray, sources: Iterable[int]) -> Iterator[bytes | bytearray | memoryview]:
    """On rank 0, the bytes of each source in turn, so that it holds one at a time; nothing on other ranks, which
    must iterate too."""
    rank, device = dist.get_rank(), platform().device
    sizes = gather_rows(torch.tensor([len(own)])).flatten().tolist()
    for source in sources:
        if source == 0 and rank == 0:
            yield own
        elif rank == source and own:
            dist.send(torch.frombuffer(own, dtype=torch.uint8).to(device), 0)
        elif rank == 0 and not sizes[source]:
            yield b""
        elif rank == 0:
            box = torch.empty(sizes[source], dtype=torch.uint8, device=device)
            dist.recv(box, source)
            yield box.cpu().numpy().data
