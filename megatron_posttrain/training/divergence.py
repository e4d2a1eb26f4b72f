"""Divergences of two distributions over a vocabulary that tensor parallel ranks share, without gathering logits. p is
the teacher's distribution, q the student's, both softmax(logits / temperature). Computed in fp32, or in fp64 where
logits are."""

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_posttrain.errors import UserError
from megatron_posttrain.training.token_logprobs import all_reduce, row_chunks

Divergence = Literal["forward_kl", "reverse_kl", "jsd"]
Group = dist.ProcessGroup | None


def divergence(
    student: Tensor, teacher: Tensor, kind: Divergence = "forward_kl", *,
    beta: float = 0.5, temperature: float = 1.0, vocab_size: int | None = None, group: Group = None,
) -> Tensor:  # fmt: skip
    """[n] nats a token, differentiable in the student's logits; over the whole vocabulary.

    forward_kl: KL(p || q); reverse_kl: KL(q || p); jsd: beta KL(p || m) + (1 - beta) KL(q || m) with
    m = beta p + (1 - beta) q (GKD, arXiv 2306.13649, eq. 1). Not multiplied by temperature^2.

    Args:
        student, teacher: [n, columns] logits of this rank's columns, the same columns of both.
        vocab_size: columns of all ranks that exist; those behind them have no probability. None: all.
        group: the ranks that share the columns; None: this one has all.
    """
    check_divergence(kind, beta)
    columns = student.shape[-1]
    rank = 0 if group is None else group.rank()
    real = columns if vocab_size is None else max(0, min(columns, vocab_size - rank * columns))
    return _Divergence.apply(student, teacher, real, group, kind, beta, temperature)


def check_divergence(kind: str, beta: float) -> None:
    if kind not in get_args(Divergence):
        raise UserError(f"divergence must be one of {', '.join(get_args(Divergence))}, found {kind!r}")
    if kind == "jsd" and not 0 < beta < 1:
        limit = "reverse_kl" if beta >= 1 else "forward_kl"
        raise UserError(f"beta must be between 0 and 1 for jsd, found {beta}; {limit} is what jsd / beta goes to there")


class _Divergence(torch.autograd.Function):
    """The gradient is computed with the value: both need the same exponentials, and one of [n, columns] is kept."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, real: int, group: Group, kind: str, beta: float, temperature: float
    ) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        gradient = torch.zeros_like(student) if wanted else None
        values = []
        for rows in row_chunks(student):
            q, p = _log_softmaxes([student[rows, :real], teacher[rows, :real]], group, temperature)
            value, slope = _value_and_slope(q, p, group, kind, beta)
            values.append(value)
            if gradient is not None:
                gradient[rows, :real] = slope.div_(temperature)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad[:, None].to(gradient.dtype), None, None, None, None, None, None


def _value_and_slope(q: Tensor, p: Tensor, group: Group, kind: str, beta: float) -> tuple[Tensor, Tensor]:
    """From log-probs [n, columns]: the divergence [n], and its derivative by the student's scaled logits. For sum_i q_i
    f_i the derivative by logit j is q_j (g_j - sum_i q_i g_i), g_j the derivative by q_j."""
    if kind == "forward_kl":
        value = (p.exp() * (p - q)).sum(-1)
        all_reduce(value, group, dist.ReduceOp.SUM)
        return value, q.exp() - p.exp()
    if kind == "reverse_kl":
        ratio, weights = q - p, q.exp()
        value = (weights * ratio).sum(-1)
        all_reduce(value, group, dist.ReduceOp.SUM)
        return value, weights * (ratio - value[:, None])
    mixture = torch.logaddexp(p + math.log(beta), q + math.log1p(-beta))
    ratio, weights = q - mixture, q.exp()
    both = torch.stack([(p.exp() * (p - mixture)).sum(-1), (weights * ratio).sum(-1)])
    all_reduce(both, group, dist.ReduceOp.SUM)
    value = beta * both[0] + (1 - beta) * both[1]
    return value, (1 - beta) * weights * (ratio - both[1][:, None])


def _log_softmaxes(parts: Sequence[Tensor], group: Group, temperature: float) -> list[Tensor]:
    """New tensors; one message for the largest logits of all of them, one for the sums."""
    scaled = [
        part.to(torch.promote_types(part.dtype, torch.float32), copy=True).div_(temperature) for part in parts
    ]  # fmt: skip
    lowest = [x.new_full(x.shape[:1], -torch.inf) for x in scaled]
    tops = torch.stack([x.amax(-1) if x.shape[-1] else low for x, low in zip(scaled, lowest, strict=True)])
    all_reduce(tops, group, dist.ReduceOp.MAX)
    for x, top in zip(scaled, tops, strict=True):
        x.sub_(top[:, None])
    sums = torch.stack([x.exp().sum(-1) for x in scaled])
    all_reduce(sums, group, dist.ReduceOp.SUM)
    return [x.sub_(total.log()[:, None]) for x, total in zip(scaled, sums, strict=True)]


# ---- the teacher's likeliest tokens ------------------------------------------------------------------------


def top_k_divergence(
    student: Tensor, tokens: Tensor, logprobs: Tensor, kind: Divergence = "forward_kl", *,
    beta: float = 0.5, temperature: float = 1.0, vocab_size: int | None = None, group: Group = None,
) -> Tensor:  # fmt: skip
    """[n] as `divergence`, of distributions over k + 1 events: the teacher's k likeliest tokens, and all others.
    `tokens`, `logprobs`: [n, k], the teacher's, at `temperature`."""
    check_divergence(kind, beta)
    vocabulary = student.shape[-1] * (1 if group is None else group.size()) if vocab_size is None else vocab_size
    found = _ColumnLogprobs.apply(student, tokens, vocabulary, group, temperature)
    q, p = with_rest(found), with_rest(logprobs.to(found.dtype))
    if kind == "forward_kl":
        return (p.exp() * (p - q)).sum(-1)
    if kind == "reverse_kl":
        return (q.exp() * (q - p)).sum(-1)
    mixture = torch.logaddexp(p + math.log(beta), q + math.log1p(-beta))
    return beta * (p.exp() * (p - mixture)).sum(-1) + (1 - beta) * (q.exp() * (q - mixture)).sum(-1)


def with_rest(logprobs: Tensor) -> Tensor:
    """[n, k] log-probs of different events -> [n, k + 1], the last of none of them. At least `eps` of the mass is left
    to it: rounding may leave less than nothing."""
    smallest = torch.finfo(logprobs.dtype).eps
    rest = (1 - logprobs.exp().sum(-1, keepdim=True)).clamp(min=smallest)
    return torch.cat([logprobs, rest.log()], dim=-1)


class _ColumnLogprobs(torch.autograd.Function):
    """log softmax(logits / temperature) [n, k] of k tokens a row."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor, vocab_size: int, group: Group, temperature: float) -> Tensor:
        columns = logits.shape[-1]
        first = 0 if group is None else group.rank() * columns
        real = max(0, min(columns, vocab_size - first))
        mine = (tokens >= first) & (tokens < first + real)
        index = (tokens - first).clamp(0, max(0, real - 1))
        found = []
        for rows in row_chunks(logits):
            (logprobs,) = _log_softmaxes([logits[rows, :real]], group, temperature)
            of_mine = logprobs.gather(-1, index[rows]) if real else logprobs.new_zeros(mine[rows].shape)
            found.append(of_mine * mine[rows])
        chosen = torch.cat(found)
        all_reduce(chosen, group, dist.ReduceOp.SUM)
        ctx.save_for_backward(logits, index, mine)
        ctx.real, ctx.group, ctx.temperature = real, group, temperature
        return chosen

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, index, mine = ctx.saved_tensors
        out = torch.zeros_like(logits)
        for rows in row_chunks(logits):
            (logprobs,) = _log_softmaxes([logits[rows, : ctx.real]], ctx.group, ctx.temperature)
            if ctx.real:
                slope = logprobs.exp_().mul_(-grad[rows].sum(-1, keepdim=True))
                slope.scatter_add_(-1, index[rows], grad[rows] * mine[rows])
                out[rows, : ctx.real] = slope.div_(ctx.temperature)
        return out, None, None, None, None
