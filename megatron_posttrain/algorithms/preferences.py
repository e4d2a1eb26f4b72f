"""What training on preferences shares: rows, micro-batches that hold whole pairs, and one value per conversation."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor

from megatron_posttrain.config.schema import Config
from megatron_posttrain.data.batch import PackedBatch
from megatron_posttrain.data.batch import Sequence as TokenSequence
from megatron_posttrain.data.pairs import Preference, PreferenceDataset
from megatron_posttrain.data.rows import read_rows
from megatron_posttrain.parallel.exchange import summed
from megatron_posttrain.platform import platform
from megatron_posttrain.training.batches import rank_micro_batches, rank_token_batches, to_rows
from megatron_posttrain.training.engine import Engine
from megatron_posttrain.training.finite import anywhere
from megatron_posttrain.training.heads import Head, Output
from megatron_posttrain.training.limits import check_positions
from megatron_posttrain.training.prepare import Prepared
from megatron_posttrain.training.totals import Mean

# (a head's output, batch) -> [sequences of the micro-batch]
SequenceValues = Callable[[Output, PackedBatch], Tensor]


def read_preferences(prepared: Prepared, source: str | list[str], *, labelled: bool = False) -> PreferenceDataset:
    """Raises UserError for rows that are no preferences, or longer than the model's positions."""
    config, data = prepared.config, prepared.config.data
    dataset = PreferenceDataset(
        read_rows(source, columns=data.columns, use="preference"),
        prepared.tokenizer,
        data.sequence_length,
        labelled=labelled,
        overlong=data.overlong,
        seed=config.training.seed,
        omissions=data.omissions,
    )
    check_positions(dataset.lengths, prepared.arch)
    return dataset


def token_budget(config: Config) -> int:
    """Tokens of a micro-batch: `micro_batch_size` pairs of the longest conversations."""
    return 2 * config.data.sequence_length * config.training.micro_batch_size


def sequences_of(preferences: Sequence[Preference]) -> list[list[TokenSequence]]:
    """For each its two conversations, a unit, numbered 2k and 2k + 1."""
    return [
        [TokenSequence(tokens, mask, index=2 * k + side, unit=k) for side, (tokens, mask) in enumerate(x.conversations)]
        for k, x in enumerate(preferences)
    ]


def unit_batches(units: Sequence[Sequence[TokenSequence]], engine: Engine, config: Config) -> list[PackedBatch]:
    """This data parallel rank's micro-batches: `micro_batch_size` units each, or with `data.packing` as many as
    `token_budget` allows. A unit's sequences are never parted."""
    if not config.data.packing:
        return rank_micro_batches(units, engine.groups, config.training.micro_batch_size)
    return rank_token_batches(list(chain(*units)), engine.groups, engine.arch, token_budget(config))


def sides(batch: PackedBatch) -> tuple[list[int], list[int], list[int]]:
    """Of the pairs of a micro-batch: where the first sequences are, where the second, and the pairs' numbers."""
    first, second = ([unit[side] for unit in batch.units] for side in (0, 1))
    return first, second, [batch.sequence_ids[at] // 2 for at in first]


def answer_logprobs(output: Output, batch: PackedBatch) -> Tensor:
    """[n] log-probs of the tokens that count, summed over each sequence."""
    return sequence_sums(output["logprobs"] * batch.loss_mask, batch)


def sequence_sums(values: Tensor, batch: PackedBatch) -> Tensor:
    """[t] -> [n]; in one order on every device, so that runs repeat to the last bit."""
    return to_rows(values, batch.cu_seqlens).sum(-1)


def last_values(output: Output, batch: PackedBatch) -> Tensor:
    """[n] the scalar at the last token of each sequence."""
    lengths = torch.tensor(batch.real_lengths, device=batch.cu_seqlens.device)
    return output["values"][(batch.cu_seqlens[:-1] + lengths - 1).long()]


@torch.no_grad()
def score_sequences(
    engine: Engine, units: Iterable[Sequence[TokenSequence]], budget: int, head: Head, values: SequenceValues
) -> Tensor:
    """Collective: [sequences of all units] fp32 on the host of every rank, under the present weights, without gradient.

    Raises NotFiniteError on all ranks where one is not finite.
    """
    # One by one: nothing here needs both conversations of a pair.
    numbered = [replace(sequence, index=index, unit=None) for index, sequence in enumerate(chain(*units))]
    batches = rank_token_batches(numbered, engine.groups, engine.arch, budget)
    found = torch.zeros(len(numbered))
    for batch, output in zip(batches, engine.forward(batches, head), strict=True):
        unpadded = {name: each[: len(batch.tokens)] for name, each in output.items()}
        of_batch = values(unpadded, batch.to(platform().device)).cpu()
        for index, value in zip(batch.sequence_ids, of_batch, strict=True):
            if index >= 0:
                found[index] = value
    if anywhere(not found.isfinite().all()):
        engine.refuse_outputs(batches, head)
    return summed(found, engine.groups.data)  # zero where another rank has it


def means(metrics: Mapping[str, Tensor]) -> dict[str, Mean]:
    """Metrics of every pair as means that know their counts."""
    return {name: Mean(each.sum(), len(each)) for name, each in metrics.items()}
