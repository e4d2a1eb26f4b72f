"""Micro-batches on the host: sequences laid end to end (THD), before context parallelism slices them."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_posttrain.data.packing import unit_members

FILLER = -1  # the index of a sequence that only fills a micro-batch


@dataclass
class Sequence:
    """One conversation or sample. Every array is per token: entry t belongs to token t, not to its label.

    Lists become arrays: int32 tokens, float32 masks and extras.
    """

    token_ids: Any  # [t]
    loss_mask: Any  # [t] what the token's loss is multiplied by: 1 or a weight where it counts (an assistant's), else 0
    extras: dict[str, Any] = field(default_factory=dict)  # each [t], such as old log-probs and advantages
    index: int = 0  # the caller's number of this sequence; comes back in `PackedBatch.sequence_ids`
    experts: Any = None  # [t - 1, layers, top-k] that every token but the last is to be sent to
    unit: int | None = None  # sequences of one unit stay in one micro-batch, in their order; None: it is its own

    def __post_init__(self) -> None:
        self.token_ids = np.asarray(self.token_ids, dtype=np.int32)
        self.loss_mask = np.asarray(self.loss_mask, dtype=np.float32)
        self.extras = {name: np.asarray(values, dtype=np.float32) for name, values in self.extras.items()}


@dataclass
class PackedBatch:
    """One micro-batch in natural order. T counts each sequence's padding; n is the number of sequences.

    `labels`, `loss_mask` and `extras` are aligned: entry t speaks of the token that position t predicts,
    the next one of the same sequence. The last token of a sequence predicts nothing: label 0, mask 0.
    """

    tokens: Tensor  # [T] int64
    labels: Tensor  # [T] int64
    loss_mask: Tensor  # [T] float32
    position_ids: Tensor  # [T] int64, from 0 in each sequence
    cu_seqlens: Tensor  # [n + 1] int32, padded lengths summed
    max_seqlen: int
    real_lengths: list[int]
    sequence_ids: list[int]  # each sequence's `index`; FILLER counts nowhere
    units: list[list[int]]  # positions in `sequence_ids` that belong together, without fillers
    extras: dict[str, Tensor] = field(default_factory=dict)  # each [T] float32
    experts: Tensor | None = None  # [T, layers, top-k] of the tokens themselves; zeros where there is no choice
    routes: dict[int, Tensor] = field(
        default_factory=dict
    )  # by layer: what this rank's routers chose in an earlier pass

    @property
    def counts(self) -> tuple[float, int, int]:
        """Labels that count in the loss, by weight, sequences, units; without fillers."""
        return float(self.loss_mask.double().sum()), sum(map(len, self.units)), len(self.units)

    @property
    def real_tokens(self) -> int:
        """Tokens without padding."""
        return sum(self.real_lengths)

    @property
    def has_padding(self) -> bool:
        return self.real_tokens < len(self.tokens)

    @property
    def padding(self) -> Tensor:
        """[T] bool, True at padding."""
        ends = self.cu_seqlens[:-1] + torch.tensor(self.real_lengths, device=self.cu_seqlens.device)
        lengths = self.cu_seqlens.diff().long()
        return torch.arange(len(self.tokens), device=ends.device) >= ends.repeat_interleave(lengths)

    def padded_to(self, multiple: int) -> PackedBatch:
        """The same batch with T a multiple of `multiple`: the last sequence has more padding."""
        more = -len(self.tokens) % multiple
        if not more:
            return self

        def longer(values: Tensor) -> Tensor:
            return torch.cat([values, values.new_zeros(more, *values.shape[1:])])

        last = int(self.cu_seqlens[-1] - self.cu_seqlens[-2]) + more
        cu_seqlens = self.cu_seqlens.clone()
        cu_seqlens[-1] += more
        return replace(
            self,
            tokens=longer(self.tokens),
            labels=longer(self.labels),
            loss_mask=longer(self.loss_mask),
            position_ids=torch.cat([self.position_ids, torch.arange(last - more, last)]),
            cu_seqlens=cu_seqlens,
            max_seqlen=max(self.max_seqlen, last),
            extras={name: longer(values) for name, values in self.extras.items()},
            experts=None if self.experts is None else longer(self.experts),
        )

    def per_sequence(self, values: Tensor) -> list[Tensor]:
        """Cut per-label values [T] into one tensor [length - 1] a sequence, without padding."""
        starts = self.cu_seqlens.tolist()
        return [values[at : at + length - 1] for at, length in zip(starts, self.real_lengths, strict=False)]

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch with its tensors on `device`."""
        moved: dict[str, Any] = {
            f.name: value.to(device) for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **moved, extras={name: value.to(device) for name, value in self.extras.items()})


def pack_batch(sequences: Seq[Sequence], *, multiple: int = 1, pad_token: int = 0) -> PackedBatch:
    """Lay sequences end to end, each padded at its end to a multiple of `multiple` tokens.

    Context parallelism needs lengths divisible by 2 x context, sequence parallelism a total divisible by
    tensor. Padding follows the real tokens, so causal attention keeps it from reaching them; it carries no
    loss. A sequence without some key of `extras` gets zeros there.
    """
    if not sequences:
        raise ValueError("a micro-batch needs at least one sequence")
    lengths = [len(sequence.token_ids) for sequence in sequences]
    if min(lengths) == 0:
        raise ValueError("a sequence without tokens cannot be packed")
    padded = [-(-length // multiple) * multiple for length in lengths]
    cu_seqlens = torch.tensor([0, *padded]).cumsum(0)
    total = int(cu_seqlens[-1])
    starts = cu_seqlens.tolist()
    tokens = torch.full((total,), pad_token, dtype=torch.int64)
    labels = torch.zeros(total, dtype=torch.int64)
    loss_mask = torch.zeros(total)
    names = sorted({name for sequence in sequences for name in sequence.extras})
    extras = {name: torch.zeros(total) for name in names}
    routed = [torch.from_numpy(sequence.experts) for sequence in sequences if sequence.experts is not None]
    experts = routed[0].new_zeros(total, *routed[0].shape[1:]) if routed else None
    for start, length, sequence in zip(starts, lengths, sequences, strict=False):
        token_ids = torch.as_tensor(sequence.token_ids, dtype=torch.int64)
        tokens[start : start + length] = token_ids
        labels[start : start + length - 1] = token_ids[1:]
        if experts is not None and sequence.experts is not None:
            experts[start : start + length - 1] = torch.from_numpy(sequence.experts)
        per_token = {"loss_mask": sequence.loss_mask, **sequence.extras}
        for name, values in per_token.items():
            if len(values) != length:
                raise ValueError(f"{name} has {len(values)} entries for {length} tokens")
            target = loss_mask if name == "loss_mask" else extras[name]
            target[start : start + length - 1] = torch.as_tensor(values, dtype=torch.float32)[1:]
    return PackedBatch(
        tokens=tokens,
        labels=labels,
        loss_mask=loss_mask,
        position_ids=torch.cat([torch.arange(length) for length in padded]),
        cu_seqlens=cu_seqlens.to(torch.int32),
        max_seqlen=max(padded),
        real_lengths=lengths,
        sequence_ids=[sequence.index for sequence in sequences],
        units=_units(sequences),
        extras=extras,
        experts=experts,
    )


def filler() -> Sequence:
    """One token without loss, for a micro-batch that has nothing else."""
    return Sequence(np.zeros(1, np.int32), np.zeros(1), index=FILLER)


def unit_numbers(sequences: Seq[Sequence]) -> list[int]:
    """Of every sequence, a number that only its unit has."""
    numbers: dict[tuple[bool, int], int] = {}
    keys = [(s.unit is None, i if s.unit is None else s.unit) for i, s in enumerate(sequences)]
    return [numbers.setdefault(key, len(numbers)) for key in keys]


def _units(sequences: Seq[Sequence]) -> list[list[int]]:
    real = [i for i, sequence in enumerate(sequences) if sequence.index != FILLER]
    return [[real[k] for k in unit] for unit in unit_members(unit_numbers([sequences[i] for i in real]))]
