"""Log-probs of whole sequences, however the layout spreads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch.distributed as dist
from torch import Tensor

from megatron_posttrain.data.batch import PackedBatch
from megatron_posttrain.data.batch import Sequence as TokenSequence
from megatron_posttrain.parallel.groups import Groups
from megatron_posttrain.training.batches import rank_token_batches
from megatron_posttrain.training.engine import Engine
from megatron_posttrain.training.finite import anywhere
from megatron_posttrain.training.heads import LabelLogprobs, Output


def sequence_logprobs(
    engine: Engine, sequences: Sequence[TokenSequence], token_budget: int, temperature: float = 1.0
) -> list[Tensor]:
    """log p(token t+1 | tokens 0..t) at `temperature` where t+1 counts, else 0, of every sequence.

    [length - 1] fp32 on the host, on every rank. Sequences share micro-batches of at most `token_budget` tokens.
    """
    numbered = [replace(sequence, index=index) for index, sequence in enumerate(sequences)]
    batches = rank_token_batches(numbered, engine.groups, token_budget)
    head = LabelLogprobs(temperature)
    everything = gather_sequences(engine.groups, batches, engine.forward(batches, head))
    if anywhere(not all(values.isfinite().all() for values in everything)):
        engine.refuse_outputs(batches, head)
    return everything


def gather_sequences(groups: Groups, batches: Sequence[PackedBatch], outputs: Sequence[Output]) -> list[Tensor]:
    """Log-probs of every data parallel rank's micro-batches in the order of their sequences' indices from 0."""
    layout = groups.layout
    found: dict[int, Tensor] = {}
    for batch, output in zip(batches, outputs, strict=True):
        for index, values in zip(batch.sequence_ids, batch.per_sequence(output["logprobs"]), strict=True):
            found[index] = values.cpu()
    gathered: list[dict[int, Tensor]] = [found] * layout.data
    if layout.data > 1:
        dist.all_gather_object(gathered, found, group=groups.data)
    everything = {index: values for part in gathered for index, values in part.items()}
    return [everything[i] for i in sorted(everything) if i >= 0]
