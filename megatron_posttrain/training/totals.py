"""Counts of a global batch, and means that know their counts: the one place for denominators."""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_posttrain.data.batch import PackedBatch
from megatron_posttrain.platform import platform


@dataclass(frozen=True)
class Totals:
    """Of a global batch, whatever rank and micro-batch they are in."""

    tokens: float  # that count in the loss, by weight: a weighted mean is sum(w l) / sum(w)
    sequences: int
    units: int  # sequences that belong together, such as a pair

    @classmethod
    def of(cls, micro_batches: Sequence[PackedBatch], group: dist.ProcessGroup) -> Self:
        """Collective over the data parallel group, whose ranks have different micro-batches."""
        counts = torch.tensor([batch.counts for batch in micro_batches], dtype=torch.float64).sum(0)
        if group.size() > 1:
            counts = counts.to(platform().device)
            dist.all_reduce(counts, group=group)
        tokens, *others = counts.tolist()
        return cls(int(tokens) if tokens.is_integer() else tokens, *map(int, others))


# What a loss is divided by that is a mean over all tokens, sequences or units of the global batch
per_token, per_sequence, per_unit = attrgetter("tokens"), attrgetter("sequences"), attrgetter("units")


@dataclass(frozen=True)
class Mean:
    """`total` / `count`; of parts of a batch, their sum is that of the whole."""

    total: float | Tensor
    count: float | Tensor

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> float:
        return float(self.total) / float(self.count) if self.count else 0.0
