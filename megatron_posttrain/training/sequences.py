"""Log-probs of whole sequences, however the layout spreads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch.distributed as dist
from torch import Tensor

from megatron_posttrain.data.batch import Sequence as TokenSequence
from megatron_posttrain.training.batches import rank_token_batches
from megatron_posttrain.training.engine import Engine
from megatron_posttrain.training.finite import anywhere


def sequence_logprobs(
    engine: Engine, sequences: Sequence[TokenSequence], token_budget: int, temperature: float = 1.0
) -> list[Tensor]:
    """log p(token t+1 | tokens 0..t) at `temperature` of every sequence, [length - 1] fp32 on the host, on every rank.

    Sequences share micro-batches of at most `token_budget` tokens.
    """
    engine.temperature = temperature
    groups, layout = engine.groups, engine.groups.layout
    numbered = [replace(sequence, index=index) for index, sequence in enumerate(sequences)]
    batches = rank_token_batches(numbered, groups, token_budget)
    found: dict[int, Tensor] = {}
    for batch, output in zip(batches, engine.logprobs(batches), strict=True):
        for index, values in zip(batch.sequence_ids, batch.per_sequence(output.logprobs), strict=True):
            found[index] = values.cpu()
    gathered: list[dict[int, Tensor]] = [found] * layout.data
    if layout.data > 1:
        dist.all_gather_object(gathered, found, group=groups.data)
    everything = {index: values for part in gathered for index, values in part.items()}
    if anywhere(not all(values.isfinite().all() for values in everything.values())):
        engine.refuse_logprobs(batches)
    return [everything[i] for i in range(len(sequences))]
