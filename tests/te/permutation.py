"""`transformer_engine.pytorch.triton.permutation`, its Triton kernels, in torch.

A row map is [tokens, experts]: where a token's copy for an expert goes, -1 where it has none. Copies are in the order
of experts, then of tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def make_row_id_map(routing_map: Tensor, num_tokens: int, num_experts: int) -> Tensor:
    chosen = routing_map.bool().T.flatten()
    rows = torch.where(chosen, chosen.cumsum(0) - 1, -1)
    return rows.view(num_experts, num_tokens).T.contiguous()


def _pairs(row_id_map: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    tokens, experts = torch.nonzero(row_id_map >= 0, as_tuple=True)
    return tokens, experts, row_id_map[tokens, experts]


def permute_with_mask_map(
    inp: Tensor, row_id_map: Tensor, probs: Tensor | None, scale: None, num_tokens: int, num_experts: int,
    num_out_tokens: int, hidden_size: int, scale_hidden_dim: int | None,
) -> tuple[Tensor, None, Tensor | None]:  # fmt: skip
    tokens, experts, rows = _pairs(row_id_map)
    out = inp.new_zeros(num_out_tokens, hidden_size)
    out[rows] = inp[tokens]
    if probs is None:
        return out, None, None
    permuted = probs.new_zeros(num_out_tokens)
    permuted[rows] = probs[tokens, experts]
    return out, None, permuted


def unpermute_with_mask_map(
    inp: Tensor, row_id_map: Tensor, merging_probs: Tensor | None, permuted_probs: Tensor | None, num_tokens: int,
    num_experts: int, hidden_size: int,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    tokens, experts, rows = _pairs(row_id_map)
    copies = inp[rows].float()
    if merging_probs is not None:
        copies = copies * merging_probs[tokens, experts, None].float()
    out = inp.new_zeros(num_tokens, hidden_size, dtype=torch.float32).index_add_(0, tokens, copies).to(inp.dtype)
    if permuted_probs is None:
        return out, None
    probs = permuted_probs.new_zeros(num_tokens, num_experts)
    probs[tokens, experts] = permuted_probs[rows]
    return out, probs


def unpermute_with_mask_map_bwd_with_merging_probs(
    fwd_output_grad: Tensor, row_id_map: Tensor, fwd_input: Tensor, merging_probs: Tensor, num_tokens: int,
    num_experts: int, num_out_tokens: int, hidden_size: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    tokens, experts, rows = _pairs(row_id_map)
    gradient = fwd_output_grad.new_zeros(num_out_tokens, hidden_size)
    gradient[rows] = fwd_output_grad[tokens] * merging_probs[tokens, experts, None].to(fwd_output_grad.dtype)
    probs = merging_probs.new_zeros(num_tokens, num_experts)
    probs[tokens, experts] = (fwd_output_grad[tokens].float() * fwd_input[rows].float()).sum(-1).to(probs.dtype)
    return gradient, probs


def make_chunk_sort_map(split_sizes: Tensor, sorted_indices: Tensor, num_tokens: int, num_splits: int) -> Tensor:
    """[tokens]: where each row goes when the chunks stand in the order of `sorted_indices`."""
    sizes, order = split_sizes.tolist(), sorted_indices.tolist()
    starts = [0] * num_splits
    position = 0
    for chunk in order:
        starts[chunk] = position
        position += sizes[chunk]
    return torch.cat([torch.arange(starts[i], starts[i] + sizes[i]) for i in range(num_splits)])


def sort_chunks_by_map(
    inp: Tensor, row_id_map: Tensor, probs: Tensor | None, num_tokens: int, hidden_size: int, is_forward: bool
) -> tuple[Tensor, Tensor | None]:
    def moved(rows: Tensor) -> Tensor:
        if not is_forward:
            return rows[row_id_map]
        return torch.empty_like(rows).index_copy_(0, row_id_map, rows)

    return moved(inp), None if probs is None else moved(probs)
