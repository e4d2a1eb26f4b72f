"""Context parallelism's view of a packed micro-batch: which tokens are this rank's, and back again."""

import itertools

import torch
import torch.distributed as dist
from torch import Tensor


def local_index(cu_seqlens: Tensor, rank: int, size: int) -> Tensor:
    """[t / size] positions of this rank's tokens: chunks `rank` and `2 * size - 1 - rank` of every sequence. Each
    sequence's length must be a multiple of 2 * size. Two chunks balance causal attention's work."""
    if size == 1:
        return torch.arange(int(cu_seqlens[-1]))
    bounds = cu_seqlens.tolist()
    parts = []
    for start, end in itertools.pairwise(bounds):
        chunk = (end - start) // (2 * size)
        for number in (rank, 2 * size - 1 - rank):
            parts.append(torch.arange(start + number * chunk, start + (number + 1) * chunk))
    return torch.cat(parts)


def gather_tokens(local: Tensor, cu_seqlens: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[t / size, ...] of every rank -> [t, ...] in natural order, differentiable. Every rank goes on to compute the
    same loss of all t values, so the gradient of a rank's own part is already whole: backward takes it and sums
    nothing."""
    if group.size() == 1:
        return local
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

    index = torch.cat([local_index(cu_seqlens, r, group.size()) for r in range(group.size())])
    gathered = gather_from_sequence_parallel_region(local, tensor_parallel_output_grad=False, group=group)
    return gathered[torch.argsort(index).to(local.device)]
