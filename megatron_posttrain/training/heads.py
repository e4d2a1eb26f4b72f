"""Heads: what is computed from the output layer's values of chosen tokens, under every layout."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from megatron_posttrain.data.batch import PackedBatch
from megatron_posttrain.training.token_logprobs import normaliser, token_logprobs

Output = Mapping[str, Tensor]  # by name [t, ...] fp32, in natural order whatever the layout; 0 where not computed


@dataclass(frozen=True)
class Rows:
    """The tokens of a micro-batch on this context rank that a head is computed for."""

    batch: PackedBatch  # the whole micro-batch, on the host
    index: Tensor  # [n] their positions in it
    labels: Tensor  # [n] the tokens that follow them, on the device
    vocab_size: int  # columns that exist; the padded ones behind them have no probability
    tensor: dist.ProcessGroup  # whose ranks share the columns


class Head(Protocol):
    """A value given to `Engine.forward` and `Engine.train_step`; the engine gathers what it returns over context
    ranks, and from the last pipeline stage."""

    @property
    def widths(self) -> Mapping[str, int]:
        """By name the values of a token that the output has; 0: one, without a dimension for it."""

    def positions(self, batch: PackedBatch) -> Tensor:
        """[t] bool: the tokens that the output layer is computed for."""

    def __call__(self, logits: Tensor, rows: Rows) -> Output:
        """Of logits [n, columns of this tensor rank]: by name [n] or [n, width] fp32, the same on all tensor ranks."""


class OfLabels:
    """What heads share that are computed for every label that counts."""

    def positions(self, batch: PackedBatch) -> Tensor:
        return batch.loss_mask != 0


@dataclass(frozen=True)
class LabelLogprobs(OfLabels):
    """Of every label that counts: `logprobs`, log softmax(logits / temperature), `entropy` of that distribution and,
    where they are asked for, `normalisers`, the log of the sum over the vocabulary of exp(logits / temperature); nats,
    differentiable."""

    temperature: float = 1.0
    normalisers: bool = False

    @property
    def widths(self) -> Mapping[str, int]:
        return dict.fromkeys(("logprobs", "entropy", *(["normalisers"] if self.normalisers else [])), 0)

    def __call__(self, logits: Tensor, rows: Rows) -> Output:
        found = token_logprobs(logits, rows.labels, rows.vocab_size, rows.tensor, self.temperature)
        return dict(zip(self.widths, found, strict=False))


@dataclass(frozen=True)
class Scalars(OfLabels):
    """`values`: of a model whose output layer has one column (reward models, critics), differentiable."""

    last: bool = False  # of the last token of every sequence only; else of every token whose label counts
    widths: ClassVar[Mapping[str, int]] = {"values": 0}

    def positions(self, batch: PackedBatch) -> Tensor:
        if not self.last:
            return super().positions(batch)
        chosen = torch.zeros(len(batch.tokens), dtype=torch.bool)
        real = torch.tensor(batch.sequence_ids) >= 0
        chosen[(batch.cu_seqlens[:-1] + torch.tensor(batch.real_lengths) - 1)[real].long()] = True
        return chosen

    def __call__(self, logits: Tensor, rows: Rows) -> Output:
        return {"values": logits[:, 0].float()}


@dataclass(frozen=True)
class TopK(OfLabels):
    """Of every label that counts the `k` likeliest tokens: `logprobs` [n, k] of softmax(logits / temperature), falling,
    and their numbers `tokens` [n, k], which fp32 holds exactly. Without gradient: of teachers."""

    k: int
    temperature: float = 1.0

    @property
    def widths(self) -> Mapping[str, int]:
        return {"logprobs": self.k, "tokens": self.k}

    @torch.no_grad()
    def __call__(self, logits: Tensor, rows: Rows) -> Output:
        group, columns = rows.tensor, logits.shape[-1]
        first = group.rank() * columns
        real = max(0, min(columns, rows.vocab_size - first))
        values, tokens = logits[:, :real].topk(min(self.k, real), dim=-1)
        values = values.float() / self.temperature
        tokens = (tokens + first).float()
        if group.size() > 1:
            # Ranks with fewer columns than k send padding that no one chooses.
            missing = (0, self.k - values.shape[-1])
            mine = torch.stack([F.pad(values, missing, value=-torch.inf), F.pad(tokens, missing)])
            parts = [torch.empty_like(mine) for _ in range(group.size())]
            dist.all_gather(parts, mine, group=group)
            values, tokens = torch.cat(parts, dim=-1)
        values, order = values.topk(self.k, dim=-1)
        logprobs = values - normaliser(logits, rows.vocab_size, group, self.temperature)[:, None]
        return {"logprobs": logprobs, "tokens": tokens.gather(-1, order)}
