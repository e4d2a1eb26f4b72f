"""Global batches to this rank's micro-batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_posttrain.data.batch import PackedBatch, microbatches, pack_batch
from megatron_posttrain.data.batch import Sequence as TokenSequence
from megatron_posttrain.parallel.groups import Groups

Row = Sequence[TokenSequence]


def rank_micro_batches(rows: Sequence[Row], groups: Groups, micro_batch_size: int) -> list[PackedBatch]:
    """This data parallel rank's rows, `micro_batch_size` of them a micro-batch.

    Micro-batch number m of the global batch holds the same rows whatever the layout, so that a balancing
    loss over a micro-batch is the same too.
    """
    layout, rank = groups.layout, groups.data.rank()
    merged = [
        [sequence for row in rows[i : i + micro_batch_size] for sequence in row]
        for i in range(0, len(rows), micro_batch_size)
    ]
    return [pack_batch(m, multiple=layout.sequence_multiple) for m in merged[rank :: layout.data]]


def rank_token_batches(sequences: Row, groups: Groups, token_budget: int) -> list[PackedBatch]:
    """This data parallel rank's share of `sequences`, in micro-batches of at most `token_budget` tokens."""
    layout = groups.layout
    shares = microbatches(sequences, token_budget, layout.micro_batch_multiple)
    return [pack_batch(share, multiple=layout.sequence_multiple) for share in shares[groups.data.rank() :: layout.data]]


def to_rows(flat: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[t] packed -> [sequences, longest], zero-padded; differentiable."""
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).tolist()
    return torch.nn.utils.rnn.pad_sequence(list(flat.split(lengths)), batch_first=True)
