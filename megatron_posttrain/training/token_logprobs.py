"""Log-probabilities of given tokens from vocabulary-parallel logits, exact and in fp32."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK_ELEMENTS = 1 << 26  # logits turned to fp32 at a time: 256 MiB


def token_logprobs(
    logits: Tensor, labels: Tensor, vocab_size: int, group: dist.ProcessGroup, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """log softmax(logits / temperature)[labels] and the entropy of the distribution.

    Args:
        logits: [t, padded vocabulary / tensor size], this rank's columns.
        labels: [t] token numbers in the whole vocabulary.
        vocab_size: tokens that exist; the padded columns behind them have no probability.
        group: tensor parallel group.

    Returns:
        log-probs [t] fp32, differentiable in `logits`; entropy [t] fp32 in nats, without gradient.
    """
    return _TokenLogprobs.apply(logits, labels, vocab_size, group, temperature)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, vocab_size: int, group: dist.ProcessGroup, temperature: float
    ) -> tuple[Tensor, Tensor]:
        columns = logits.shape[-1]
        first = group.rank() * columns
        real = max(0, min(columns, vocab_size - first))
        mine = (labels >= first) & (labels < first + columns)
        index = (labels - first).clamp(0, columns - 1)
        logprobs, entropy, normalisers = [], [], []
        for rows in _chunks(logits):
            scaled = logits[rows, :real].float() / temperature
            top = scaled.amax(-1) if real else scaled.new_full((scaled.shape[0],), float("-inf"))
            _reduce(top, group, dist.ReduceOp.MAX)
            weights = (scaled - top[:, None]).exp()
            # One message for the three sums: normaliser, chosen logit, expected logit.
            sums = torch.stack(
                [
                    weights.sum(-1),
                    _chosen(scaled, index[rows], mine[rows], top),
                    (weights * (scaled - top[:, None])).sum(-1),
                ]
            )
            _reduce(sums, group, dist.ReduceOp.SUM)
            log_normaliser = sums[0].log()
            logprobs.append(sums[1] - log_normaliser)
            entropy.append(log_normaliser - sums[2] / sums[0])
            normalisers.append(log_normaliser + top)
        ctx.save_for_backward(logits, index, mine, torch.cat(normalisers))
        ctx.real, ctx.temperature = real, temperature
        result = torch.cat(entropy)
        ctx.mark_non_differentiable(result)
        return torch.cat(logprobs), result

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        logits, index, mine, normaliser = ctx.saved_tensors
        out = torch.zeros_like(logits) if ctx.real < logits.shape[-1] else torch.empty_like(logits)
        for rows in _chunks(logits):
            scale = (grad[rows] / ctx.temperature)[:, None]
            scaled = logits[rows, : ctx.real].float() / ctx.temperature
            softmax = scaled.sub_(normaliser[rows, None]).exp_().mul_(-scale)
            if ctx.real:
                chosen = (scale[:, 0] * mine[rows])[:, None]
                softmax.scatter_add_(1, index[rows, None].clamp(max=ctx.real - 1), chosen)
            out[rows, : ctx.real] = softmax.to(out.dtype)
        return out, None, None, None, None


def _chosen(scaled: Tensor, index: Tensor, mine: Tensor, top: Tensor) -> Tensor:
    if scaled.shape[-1] == 0:
        return torch.zeros_like(top)
    value = scaled.gather(1, index[:, None].clamp(max=scaled.shape[-1] - 1))[:, 0] - top
    return value * mine


def _reduce(x: Tensor, group: dist.ProcessGroup, operation: Any) -> None:
    if group.size() > 1:
        dist.all_reduce(x, op=operation, group=group)


def _chunks(logits: Tensor) -> list[slice]:
    rows = max(1, CHUNK_ELEMENTS // max(1, logits.shape[-1]))
    return [slice(i, i + rows) for i in range(0, logits.shape[0], rows)]
