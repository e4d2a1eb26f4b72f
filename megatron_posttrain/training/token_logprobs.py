"""Log-probabilities of given tokens from vocabulary-parallel logits, exact and in fp32."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_posttrain.platform import platform

CHUNK_ELEMENTS = 1 << 26  # logits turned to fp32 at a time: 256 MiB


def token_logprobs(
    logits: Tensor, labels: Tensor, vocab_size: int, group: dist.ProcessGroup, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """log softmax(logits / temperature)[labels], the entropy of the distribution, and the log of its normaliser: each
    [t] fp32, nats, differentiable in `logits`.

    Args:
        logits: [t, padded vocabulary / tensor size], this rank's columns.
        labels: [t] token numbers in the whole vocabulary.
        vocab_size: tokens that exist; the padded columns behind them have no probability.
        group: tensor parallel group.
    """
    return _TokenLogprobs.apply(logits, labels, vocab_size, group, temperature)


@torch.no_grad()
def normaliser(logits: Tensor, vocab_size: int, group: dist.ProcessGroup, temperature: float = 1.0) -> Tensor:
    """[t] fp32: log of the sum over the whole vocabulary of exp(logits / temperature); arguments as above."""
    columns = logits.shape[-1]
    real = max(0, min(columns, vocab_size - group.rank() * columns))
    found = []
    for rows in row_chunks(logits):
        part = logits[rows, :real]
        top = _largest(part, temperature)
        all_reduce(top, group, dist.ReduceOp.MAX)
        total = _shifted(part, top, temperature).exp_().sum(-1)
        all_reduce(total, group, dist.ReduceOp.SUM)
        found.append(total.log() + top)
    return torch.cat(found)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, vocab_size: int, group: dist.ProcessGroup, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        columns = logits.shape[-1]
        first = group.rank() * columns
        real = max(0, min(columns, vocab_size - first))
        mine = (labels >= first) & (labels < first + columns)
        index = (labels - first).clamp(0, columns - 1)
        logprobs, entropy, normalisers = [], [], []
        row_sums = _fused(_row_sums)
        for rows in row_chunks(logits):
            part = logits[rows, :real]
            top = _largest(part, temperature)
            all_reduce(top, group, dist.ReduceOp.MAX)
            # One message for the three sums: normaliser, chosen logit, expected logit.
            sums = row_sums(part, top, index[rows], mine[rows], temperature)
            all_reduce(sums, group, dist.ReduceOp.SUM)
            log_normaliser = sums[0].log()
            logprobs.append(sums[1] - log_normaliser)
            entropy.append(log_normaliser - sums[2] / sums[0])
            normalisers.append(log_normaliser + top)
        entropies, log_normalisers = torch.cat(entropy), torch.cat(normalisers)
        ctx.save_for_backward(logits, index, mine, log_normalisers, entropies)
        ctx.real, ctx.temperature = real, temperature
        ctx.set_materialize_grads(False)  # most losses have no term of the last two
        return torch.cat(logprobs), entropies, log_normalisers

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor | None, of_entropy: Tensor | None, of_normaliser: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        logits, index, mine, normaliser, entropy = ctx.saved_tensors
        grad = torch.zeros_like(normaliser) if grad is None else grad
        of_all = grad if of_normaliser is None else grad - of_normaliser  # both through the softmax of all columns
        out = torch.zeros_like(logits) if ctx.real < logits.shape[-1] else torch.empty_like(logits)
        softmax_gradient = _fused(_softmax_gradient)
        for rows in row_chunks(logits):
            if ctx.real:
                part = logits[rows, : ctx.real]
                softmax = softmax_gradient(part, normaliser[rows], of_all[rows] / ctx.temperature, ctx.temperature)
                chosen = (grad[rows] / ctx.temperature * mine[rows])[:, None]
                softmax.scatter_add_(1, index[rows, None].clamp(max=ctx.real - 1), chosen)
                if of_entropy is not None:  # dH / dz = -p (log p + H)
                    logs = _shifted(part, normaliser[rows], ctx.temperature)
                    weight = of_entropy[rows, None] / ctx.temperature
                    softmax -= weight * logs.exp() * (logs + entropy[rows, None])
                out[rows, : ctx.real] = softmax
        return out, None, None, None, None


def _largest(logits: Tensor, temperature: float) -> Tensor:
    """[t] fp32. The largest of the scaled logits is the largest logit, scaled: both round alike."""
    if logits.shape[-1] == 0:
        return torch.full(logits.shape[:1], -torch.inf, dtype=torch.float32, device=logits.device)
    return logits.amax(-1).float() / temperature


def _row_sums(logits: Tensor, top: Tensor, index: Tensor, mine: Tensor, temperature: float) -> Tensor:
    """[3, t] of z = logits / temperature - top: sum of exp(z), z of the chosen column where `mine`, sum of exp(z) z."""
    if logits.shape[-1] == 0:
        return top.new_zeros(3, top.shape[0])
    shifted = _shifted(logits, top, temperature)
    chosen = shifted.gather(1, index[:, None].clamp(max=logits.shape[-1] - 1))[:, 0] * mine
    weights = shifted.exp()
    return torch.stack([weights.sum(-1), chosen, weights.mul_(shifted).sum(-1)])


def _softmax_gradient(logits: Tensor, normaliser: Tensor, scale: Tensor, temperature: float) -> Tensor:
    """[t, columns] fp32: -scale * softmax(logits / temperature)."""
    return _shifted(logits, normaliser, temperature).exp_().mul_(-scale[:, None])


def _shifted(logits: Tensor, top: Tensor, temperature: float) -> Tensor:
    """A new tensor in fp32, never the logits themselves."""
    scaled = logits.to(torch.float32, copy=True)
    return (scaled if temperature == 1.0 else scaled.div_(temperature)).sub_(top[:, None])


def _fused(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """As one kernel on CUDA; the passes over [t, vocabulary] in fp32 took 54 ms on an H100 where bytes take 3."""
    return _compiled(function) if platform().name == "cuda" else function


@functools.cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function, dynamic=True)


def all_reduce(x: Tensor, group: dist.ProcessGroup | None, operation: Any) -> None:
    if group is not None and group.size() > 1:
        dist.all_reduce(x, op=operation, group=group)


def row_chunks(logits: Tensor) -> list[slice]:
    rows = max(1, CHUNK_ELEMENTS // max(1, logits.shape[-1]))
    return [slice(i, i + rows) for i in range(0, logits.shape[0], rows)]
