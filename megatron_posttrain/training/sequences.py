"""Log-probs of whole sequences, however the layout spreads them."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megatron_posttrain.data.batch import FILLER, PackedBatch
from megatron_posttrain.data.batch import Sequence as TokenSequence
from megatron_posttrain.parallel.exchange import summed
from megatron_posttrain.parallel.groups import Groups
from megatron_posttrain.training.batches import rank_token_batches
from megatron_posttrain.training.engine import Engine
from megatron_posttrain.training.finite import anywhere
from megatron_posttrain.training.heads import LabelLogprobs


def sequence_logprobs(
    engine: Engine, sequences: Sequence[TokenSequence], token_budget: int, temperature: float = 1.0
) -> list[Tensor]:
    """log p(token t+1 | tokens 0..t) at `temperature` where t+1 counts, else 0, of every sequence. [length - 1] fp32 on
    the host, on every rank. Sequences share micro-batches of at most `token_budget` tokens."""
    numbered = [replace(sequence, index=index) for index, sequence in enumerate(sequences)]
    batches = rank_token_batches(numbered, engine.groups, engine.arch, token_budget)
    outputs = batch_logprobs(engine, batches, temperature)
    sizes = [len(sequence.token_ids) - 1 for sequence in sequences]
    return values_by_sequence(engine.groups, batches, outputs, sizes)


def batch_logprobs(engine: Engine, batches: Sequence[PackedBatch], temperature: float) -> list[Tensor]:
    """Log-probs of this rank's micro-batches, each [T] fp32 on the host, aligned as their labels. Raises NotFiniteError
    on all ranks when one is not finite."""
    head = LabelLogprobs(temperature)
    outputs = engine.forward(batches, head)
    logprobs = [o["logprobs"][: len(batch.tokens)].cpu() for batch, o in zip(batches, outputs, strict=True)]
    if anywhere(not all(values.isfinite().all() for values in logprobs)):
        engine.refuse_outputs(batches, head)
    return logprobs


def sums_by_sequence(groups: Groups, batches: Sequence[PackedBatch], values: Sequence[Tensor], count: int) -> Tensor:
    """Collective over all ranks: sums over the labels of each sequence, by its index below `count`: [count] fp64 on the
    host. `values`: of each micro-batch, [T], on the ranks of the last pipeline stage; others' are not looked at."""
    totals = torch.zeros(count, dtype=torch.float64)
    for index, part in _real(batches, values) if _tells(groups) else ():
        totals[index] = part.double().sum()
    return summed(totals)


def values_by_sequence(
    groups: Groups, batches: Sequence[PackedBatch], values: Sequence[Tensor], sizes: Sequence[int]
) -> list[Tensor]:
    """As `sums_by_sequence`, but the values themselves: fp32, `sizes` of each sequence."""
    flat = torch.zeros(sum(sizes))
    for index, part in _real(batches, values) if _tells(groups) else ():
        flat.split(list(sizes))[index].copy_(part)
    return list(summed(flat).split(list(sizes)))


def _tells(groups: Groups) -> bool:
    """Whether this rank's outputs count, of those that have the same."""
    return groups.last_stage and groups.tensor.rank() == 0 and groups.context.rank() == 0


def _real(batches: Sequence[PackedBatch], values: Sequence[Tensor]) -> list[tuple[int, Tensor]]:
    """Each sequence's index and its values [length - 1]; without fillers."""
    return [
        (index, part)
        for batch, of_batch in zip(batches, values, strict=True)
        for index, part in zip(batch.sequence_ids, batch.per_sequence(of_batch), strict=True)
        if index != FILLER
    ]
