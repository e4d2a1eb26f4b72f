"""Global batches to this rank's micro-batches."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_posttrain.data.batch import PackedBatch, filler, pack_batch, unit_numbers
from megatron_posttrain.data.batch import Sequence as TokenSequence
from megatron_posttrain.data.packing import deal
from megatron_posttrain.models.architecture import Architecture
from megatron_posttrain.parallel.groups import Groups
from megatron_posttrain.parallel.layout import Layout
from megatron_posttrain.planning.flops import sequence_flops

Row = Sequence[TokenSequence]
Shares = list[list[list[int]]]  # indices of sequences: [data parallel rank][micro-batch]


def rank_micro_batches(rows: Sequence[Row], groups: Groups, micro_batch_size: int) -> list[PackedBatch]:
    """This data parallel rank's rows, `micro_batch_size` of them a micro-batch. Micro-batch number m of the global
    batch holds the same rows whatever the layout, so that a balancing loss over a micro-batch is the same too."""
    layout, starts = groups.layout, range(0, len(rows), micro_batch_size)
    merged = [[sequence for row in rows[i : i + micro_batch_size] for sequence in row] for i in starts]
    mine = merged[groups.data.rank() :: layout.data]
    return [pack_batch(sequences, multiple=layout.sequence_multiple) for sequences in mine]


def token_shares(
    lengths: Sequence[int], layout: Layout, arch: Architecture, token_budget: int, units: Sequence[int] | None = None
) -> Shares:
    """Who trains what: micro-batches of at most `token_budget` tokens, ranks with about equal FLOPs, units whole. A
    pure function of its arguments, the same on every rank: tokens need not be there to know who needs them."""
    multiple, work = layout.micro_batch_multiple // layout.data, sequence_flops(arch, lengths)
    return deal(lengths, token_budget, ranks=layout.data, multiple=multiple, units=units, work=work)


def pack_share(
    share: Sequence[list[int]], sequence: Callable[[int], TokenSequence], layout: Layout
) -> list[PackedBatch]:
    """Micro-batches of the sequences with these indices, which are asked for one micro-batch at a time."""
    found = ([sequence(index) for index in indices] or [filler()] for indices in share)
    return [pack_batch(sequences, multiple=layout.sequence_multiple) for sequences in found]


def rank_token_batches(sequences: Row, groups: Groups, arch: Architecture, token_budget: int) -> list[PackedBatch]:
    """This data parallel rank's share of `sequences`, in micro-batches of at most `token_budget` tokens."""
    lengths = [len(sequence.token_ids) for sequence in sequences]
    shares = token_shares(lengths, groups.layout, arch, token_budget, unit_numbers(sequences))
    return pack_share(shares[groups.data.rank()], sequences.__getitem__, groups.layout)


def to_rows(flat: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[t] packed -> [sequences, longest], zero-padded; differentiable."""
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).tolist()
    return torch.nn.utils.rnn.pad_sequence(list(flat.split(lengths)), batch_first=True)
