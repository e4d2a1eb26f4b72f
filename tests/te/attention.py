"""cuDNN's attention over packed sequences, and Transformer Engine's kernels for its context parallelism, in torch.

Shapes: query [t, heads, d], keys and values [t, groups, d]; log-sum-exp of a call [t, heads, 1] (cuDNN 9.6 and later),
in context parallelism's corrections [heads, t]. Where sequences lie: `cu_seqlens_*_padded`; how long they are:
`cu_seqlens_*`.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


class NVTE_Fused_Attn_Backend(enum.IntEnum):
    NVTE_No_Backend = -1
    NVTE_F16_max512_seqlen = 0
    NVTE_F16_arbitrary_seqlen = 1
    NVTE_FP8 = 2


class NVTE_Mask_Type(enum.IntEnum):
    NVTE_NO_MASK = 0
    NVTE_PADDING_MASK = 1
    NVTE_CAUSAL_MASK = 2
    NVTE_PADDING_CAUSAL_MASK = 3
    NVTE_CAUSAL_BOTTOM_RIGHT_MASK = 4
    NVTE_PADDING_CAUSAL_BOTTOM_RIGHT_MASK = 5


def get_fused_attn_backend(*args: Any) -> NVTE_Fused_Attn_Backend:
    return NVTE_Fused_Attn_Backend.NVTE_F16_arbitrary_seqlen


def _slices(bounds: Tensor, padded: Tensor | None) -> list[slice]:
    starts = (bounds if padded is None else padded).tolist()
    return [slice(a, a + n) for a, n in zip(starts, bounds.diff().tolist(), strict=False)]


def _by_group(x: Tensor, groups: int) -> Tensor:
    """[t, heads, d] -> [groups, heads of a group, t, d], fp32."""
    return x.float().unflatten(1, (groups, -1)).permute(1, 2, 0, 3)


def _weights(
    q: Tensor, k: Tensor, scale: float, mask: NVTE_Mask_Type, window: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores [groups, heads of a group, queries, keys] of one sequence, and q and k by group, fp32."""
    grouped = _by_group(q, k.shape[1])
    keys = k.float().transpose(0, 1)[:, None]
    scores = scale * grouped @ keys.transpose(-1, -2)
    distance = torch.arange(len(q))[:, None] - torch.arange(len(k))[None]
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if mask == NVTE_Mask_Type.NVTE_PADDING_CAUSAL_MASK:
        hidden |= distance < 0
    else:
        assert mask == NVTE_Mask_Type.NVTE_PADDING_MASK, mask
    if window[0] >= 0:
        hidden |= distance > window[0]
    return scores.masked_fill(hidden, float("-inf")), grouped, keys


def fused_attn_fwd(
    longest_q: int, longest_kv: int, training: bool, scale: float, dropout: float, zero_fill: bool, layout: Any,
    bias_type: Any, mask: NVTE_Mask_Type, softmax: Any, window: Sequence[int], bounds_q: Tensor, bounds_kv: Tensor,
    q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype, padded_q: Tensor | None, padded_kv: Tensor | None,
    *rest: Any,
) -> list[Tensor]:  # fmt: skip
    out = q.new_zeros(*q.shape[:2], v.shape[-1])
    lse = torch.full((*q.shape[:2], 1), float("-inf"))
    for at_q, at_kv in zip(_slices(bounds_q, padded_q), _slices(bounds_kv, padded_kv), strict=True):
        scores, _, _ = _weights(q[at_q], k[at_kv], scale, mask, window)
        total = scores.logsumexp(-1)
        values = (scores - total[..., None]).exp() @ v[at_kv].float().transpose(0, 1)[:, None]
        out[at_q] = values.permute(2, 0, 1, 3).flatten(1, 2).to(out.dtype)
        lse[at_q] = total.permute(2, 0, 1).flatten(1)[..., None]
    return [out, lse, torch.zeros(2, dtype=torch.int64)]


def fused_attn_bwd(
    longest_q: int, longest_kv: int, scale: float, dropout: float, zero_fill: bool, layout: Any, bias_type: Any,
    mask: NVTE_Mask_Type, softmax: Any, window: Sequence[int], deterministic: bool, bounds_q: Tensor,
    bounds_kv: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, dtype: torch.dtype, dqkv: Any,
    saved: Sequence[Tensor], padded_q: Tensor | None, padded_kv: Tensor | None, *rest: Any,
) -> list[Tensor | None]:  # fmt: skip
    """From the saved log-sum-exp, which under context parallelism is that of all ranks."""
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    lse = saved[0].reshape(len(q), q.shape[1])
    for at_q, at_kv in zip(_slices(bounds_q, padded_q), _slices(bounds_kv, padded_kv), strict=True):
        scores, grouped, keys = _weights(q[at_q], k[at_kv], scale, mask, window)
        g, o = (_by_group(x.view(len(q), q.shape[1], -1)[at_q], k.shape[1]) for x in (dout, out))
        weights = (scores - _by_group(lse[at_q][..., None], k.shape[1])).exp()
        values = v[at_kv].float().transpose(0, 1)[:, None]
        dv[at_kv] = (weights.transpose(-1, -2) @ g).sum(1).transpose(0, 1).to(v.dtype)
        dscores = scale * weights * (g @ values.transpose(-1, -2) - (g * o).sum(-1, keepdim=True))
        dq[at_q] = (dscores @ keys).permute(2, 0, 1, 3).flatten(1, 2).to(q.dtype)
        dk[at_kv] = (dscores.transpose(-1, -2) @ grouped).sum(1).transpose(0, 1).to(k.dtype)
    return [dq, dk, dv, None]


# Context parallelism: a rank has of every sequence the r-th part from the front and from the back.


def _halves(bounds: Tensor) -> Iterator[tuple[slice, slice]]:
    """Of every sequence of this rank."""
    for start, end in itertools.pairwise(bounds.tolist()):
        middle = (start + end) // 2
        yield slice(start, middle), slice(middle, end)


def _half_rows(bounds: Tensor, half: int) -> Tensor:
    return torch.cat([torch.arange(pair[half].start, pair[half].stop) for pair in _halves(bounds)])


def thd_read_half_tensor(tensor: Tensor, bounds: Tensor, half: int) -> Tensor:
    return tensor.index_select(tensor.dim() - 3, _half_rows(bounds, half))


def thd_read_second_half_lse(lse: Tensor, bounds: Tensor, packed: bool, length: int) -> Tensor:
    assert packed
    return lse.index_select(1, _half_rows(bounds, 1))


def thd_second_half_lse_correction(lse: Tensor, step: Tensor, bounds: Tensor, packed: bool) -> None:
    assert packed
    rows = _half_rows(bounds, 1)
    lse[:, rows] = torch.logaddexp(lse[:, rows], step.to(lse.dtype))


def thd_out_correction(
    out: Tensor, step: Tensor, lse: Tensor, step_lse: Tensor, bounds: Tensor, second_half: bool, packed: bool
) -> None:
    assert packed
    rows = _half_rows(bounds, 1) if second_half else torch.arange(out.shape[0])
    share = (step_lse - lse[:, rows]).exp().T[..., None]
    out[rows] += (step.view(len(rows), *out.shape[1:]).float() * share).to(out.dtype)


def thd_grad_correction(gradient: Tensor, step: Tensor, bounds: Tensor, first: str, second: str) -> None:
    """`first` and `second` half of every sequence: add | copy | none."""
    chosen = [half for half, what in enumerate((first, second)) if what != "none"]
    rows = [_half_rows(bounds, half) for half in chosen]
    # A step that has both halves has them where the gradient has them; one that has one half has nothing else.
    source = step[torch.cat(rows)] if len(chosen) == 2 else step
    for half, at, part in zip(chosen, rows, source.split([len(r) for r in rows]), strict=True):
        if (first, second)[half] == "add":
            gradient[at] += part
        else:
            gradient[at] = part
