"""Datasets: tokenised rows, and which of them the n-th step takes."""

import hashlib
import math
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_posttrain.config.schema import Config
from megatron_posttrain.data.cache import Encoder, TokenizedSource, tokenized, tokenized_rows
from megatron_posttrain.data.packing import pack
from megatron_posttrain.data.rows import Message, Row
from megatron_posttrain.data.tokenize import Conversation, Omissions, encode_prompt
from megatron_posttrain.errors import UserError


def shares(sizes: Seq[int], weights: Seq[float]) -> list[int]:
    """How many items an epoch takes of each source: as many in all as there are, in proportion to the weights, the
    largest remainders rounded up."""
    exact = [sum(sizes) * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in exact]
    for i in sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])[: sum(sizes) - sum(counts)]:
        counts[i] += 1
    return counts


def draw(sizes: Seq[int], weights: Seq[float] | None, random: np.random.Generator, seed: int, epoch: int) -> np.ndarray:
    """Numbers of an epoch's items, in a random order.

    Without weights every item once. With weights each source's share of its own passes, laid end to end over the
    epochs: no item of a source comes again before all of its others came.
    """
    if weights is None:
        return random.permutation(sum(sizes))
    parts = []
    for number, (size, count) in enumerate(zip(sizes, shares(sizes, weights), strict=True)):
        passes = range(epoch * count // size, ((epoch + 1) * count - 1) // size + 1) if count else range(0)
        whole = [np.random.default_rng([seed, k, number + 1]).permutation(size) for k in passes]
        begin = epoch * count % size
        parts.append(sum(sizes[:number]) + np.concatenate([*whole, np.empty(0, int)])[begin : begin + count])
    return random.permutation(np.concatenate(parts))


class Epochs:
    """The rows of step n: epochs, each in its own order, laid end to end, so that no row is left out.

    A pure function of (seed, step): a resumed run needs no state, and every rank computes the same. `equal`: all epochs
    have as many rows.
    """

    seed: int

    def __init__(self, equal: bool = True) -> None:
        self.epoch_rows = lru_cache(maxsize=2)(self._make_rows)  # a batch may reach into the next epoch
        self.rows_per_epoch = len(self.epoch_rows(0))  # of the first one
        self._sizes, self._equal = [self.rows_per_epoch], equal

    def __len__(self) -> int:
        raise NotImplementedError

    def _make_rows(self, epoch: int) -> list[Any]:
        """The rows of an epoch in their order; here all items, each a row."""
        return np.random.default_rng([self.seed, epoch]).permutation(len(self)).tolist()

    def _size(self, epoch: int) -> int:
        while len(self._sizes) <= epoch:
            self._sizes.append(self._sizes[0] if self._equal else len(self.epoch_rows(len(self._sizes))))
        return self._sizes[epoch]

    def take(self, place: int, count: int) -> list[Any]:
        """Of all epochs' rows the ones from number `place` on."""
        epoch = 0
        taken: list[Any] = []
        while len(taken) < count:
            if place < self._size(epoch):
                taken += self.epoch_rows(epoch)[place : place + count - len(taken)]
            place = max(0, place - self._size(epoch))
            epoch += 1
        return taken

    def steps_per_epoch(self, batch_size: int, epochs: float = 1.0) -> int:
        """Steps until the rows of so many epochs were seen; the next epoch fills the last step."""
        rows = sum(map(self._size, range(int(epochs)))) + math.ceil(epochs % 1 * self._size(int(epochs)))
        return math.ceil(rows / batch_size)


class TokenizedDataset(Epochs):
    """Conversations for supervised training, packed into rows of at most `sequence_length` tokens.

    Args:
        sources: what `tokenized` returned.
        sequence_length: tokens a row may have.
        packing: several conversations a row; else one each.
        overlong: drop a longer conversation, or cut its end off. Cut ones without any token left to learn
            are dropped. Both are counted: `dropped`, `truncated`, and `message` for the log.
        weights: of each source, in proportion to which an epoch takes conversations; None: each conversation once.

    Raises UserError: no conversation, or none of a source with a weight, fits.
    """

    def __init__(
        self,
        sources: Seq[TokenizedSource],
        sequence_length: int,
        packing: bool = True,
        overlong: Literal["drop", "truncate"] = "drop",
        seed: int = 0,
        weights: Seq[float] | None = None,
    ) -> None:
        self.sources, self.weights = sources, weights
        self.sequence_length, self.packing, self.seed = sequence_length, packing, seed
        cut = overlong == "truncate"
        fits = [(x.lengths <= sequence_length) | (cut & (x.first < sequence_length)) for x in sources]
        kept = [np.flatnonzero(fit) for fit in fits]
        self.sizes = [len(numbers) for numbers in kept]
        whole = np.concatenate([x.lengths[numbers] for x, numbers in zip(sources, kept, strict=True)])
        self.lengths: list[int] = np.minimum(whole, sequence_length).tolist()
        if not min(self.sizes if weights else [len(whole)]):
            x = sources[self.sizes.index(0)]
            total, longest = sum(len(y.lengths) for y in sources), max(int(y.lengths.max()) for y in sources)
            of = f"{len(x.lengths)} conversations of {x.source}" if weights else f"{total} conversations"
            raise UserError(
                f"data.sequence_length is {sequence_length}, and none of the {of} fits "
                f"(the longest has {longest} tokens); raise it to {longest}, or set data.overlong=truncate"
            )
        self._source = np.repeat(np.arange(len(sources)), self.sizes)
        starts = [np.cumsum(x.lengths, dtype=np.int64) - x.lengths for x in sources]
        self._starts = np.concatenate([start[numbers] for start, numbers in zip(starts, kept, strict=True)])
        self.dropped = sum(len(x.lengths) for x in sources) - len(whole)
        self.truncated = int((whole > sequence_length).sum())
        self.counted = sum(int(x.counted[numbers].sum()) for x, numbers in zip(sources, kept, strict=True))
        for i in np.flatnonzero(whole > sequence_length).tolist():
            self.counted -= int(np.count_nonzero(self._mask(i, int(whole[i]))[sequence_length:]))
        super().__init__(equal=weights is None or not packing)

    def __len__(self) -> int:
        return len(self.lengths)

    def _mask(self, index: int, length: int) -> np.ndarray:
        start = self._starts[index]
        return self.sources[self._source[index]].mask[start : start + length]

    def __getitem__(self, index: int) -> Conversation:
        source, start, length = self.sources[self._source[index]], self._starts[index], self.lengths[index]
        weights = source.weights[self._mask(index, length)]
        return Conversation(source.tokens[start : start + length].tolist(), weights.tolist())

    @property
    def message(self) -> str:
        """One line about what was read, packed, dropped and truncated."""
        tokens, unlearned = sum(self.lengths), sum(x.unlearned for x in self.sources)
        filled = sum(self.lengths[i] for row in self.epoch_rows(0) for i in row)
        parts = [
            f"{len(self):,} conversations, {tokens:,} tokens, {self.counted:,} with loss; "
            f"{self.rows_per_epoch:,} rows, {filled / (self.rows_per_epoch * self.sequence_length):.1%} full; "
            f"longer than {self.sequence_length} tokens: {self.dropped:,} dropped, {self.truncated:,} truncated"
        ]
        if unlearned:
            parts.append(f"{unlearned:,} left out, every turn of weight 0")
        if self.weights is not None:
            taken = zip(shares(self.sizes, self.weights), self.sizes, self.sources, strict=True)
            parts.append("an epoch takes " + ", ".join(f"{n:,} (of {size:,}) from {x.source}" for n, size, x in taken))
        return "; ".join(parts)

    @property
    def fingerprint(self) -> str:
        """Of the tokens, how much each counts, where conversations begin, and the sources' weights."""
        total = hashlib.sha256(np.array(self.lengths, np.int32).tobytes() + self._starts.tobytes())
        total.update(repr(([x.digest for x in self.sources], self.weights)).encode())
        return total.hexdigest()[:16]

    def _make_rows(self, epoch: int) -> list[list[int]]:
        """The rows of an epoch in their order, each a list of conversation indices."""
        random = np.random.default_rng([self.seed, epoch])
        order = draw(self.sizes, self.weights, random, self.seed, epoch).tolist()
        if not self.packing:
            return [[i] for i in order]
        # Packing sees lengths in another order each epoch, so equally long conversations meet new neighbours;
        # the number of rows depends on the sorted lengths alone.
        packed = pack([self.lengths[i] for i in order], self.sequence_length)
        return [[order[i] for i in packed[row]] for row in random.permutation(len(packed)).tolist()]

    def batch(self, step: int, global_batch_size: int) -> list[list[Conversation]]:
        """The rows of optimizer step `step`, counted from 0: `global_batch_size` lists of conversations."""
        return [[self[i] for i in row] for row in self.take(step * global_batch_size, global_batch_size)]


class SftDataset(TokenizedDataset):
    """Of rows in memory, what `TokenizedDataset` is of tokenised files."""

    def __init__(
        self, rows: Seq[Row], tokenizer: Any, sequence_length: int, *, omissions: Omissions = "refuse", **options: Any
    ) -> None:
        super().__init__([tokenized_rows(rows, tokenizer, omissions)], sequence_length, **options)


def read_conversations(config: Config, tokenizer: Any, cache: Path, held_out: bool = False) -> TokenizedDataset:
    """What a run trains on or, `held_out`, looks at, tokenised in directory `cache`."""
    data = config.data
    sources, weights = (data.held_out, None) if held_out else (data.sources, data.weights)
    encoder = Encoder(tokenizer, data.columns, data.omissions, data.train_on)
    found = [tokenized(source, encoder, cache) for source in sources]
    return TokenizedDataset(found, data.sequence_length, data.packing, data.overlong, config.training.seed, weights)


@dataclass(frozen=True)
class Prompt:
    index: int  # of the row in the file, dropped ones counted
    token_ids: list[int]
    answer: str | None
    metadata: dict[str, Any]
    messages: list[Message]
    options: Mapping[str, Any] = field(default_factory=dict)  # what the chat template gets beside the messages


class PromptDataset(Epochs):
    """Prompts for reinforcement learning and evaluation; `prompts` holds all of them in the file's order.

    Prompts of more than `max_prompt_length` tokens are left out and counted in `dropped`. Raises UserError: a row whose
    last message is an assistant's, or no prompt short enough.
    """

    def __init__(
        self, rows: Seq[Row], tokenizer: Any, max_prompt_length: int, seed: int = 0, omissions: Omissions = "refuse"
    ) -> None:
        self.seed, self.max_prompt_length = seed, max_prompt_length
        self.prompts: list[Prompt] = []
        longest = 0
        for index, row in enumerate(rows):
            if row.messages[-1]["role"] == "assistant":
                raise UserError(
                    f"{row.source}: a prompt must end with a user's turn, found an assistant's; "
                    "put the expected answer in `answer`"
                )
            token_ids = encode_prompt(tokenizer, row.messages, row.source, row.options, omissions)
            longest = max(longest, len(token_ids))
            if len(token_ids) <= max_prompt_length:
                self.prompts.append(Prompt(index, token_ids, row.answer, row.metadata, row.messages, row.options))
        if not self.prompts:
            raise UserError(
                f"none of the {len(rows)} prompts has at most {max_prompt_length} tokens (the longest has "
                f"{longest}); raise data.sequence_length or lower rollout.max_tokens"
            )
        self.dropped = len(rows) - len(self.prompts)
        super().__init__()

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def message(self) -> str:
        """One line about what was read and dropped."""
        return f"{len(self):,} prompts; longer than {self.max_prompt_length} tokens: {self.dropped:,} dropped"

    @property
    def fingerprint(self) -> str:
        """Of the tokens of prompts, and their answers."""
        total = hashlib.sha256()
        for prompt in self.prompts:
            total.update(f"{prompt.token_ids} {prompt.answer!r}\n".encode())
        return total.hexdigest()[:16]

    def batch(self, step: int, prompts_per_step: int) -> list[Prompt]:
        """The prompts of rollout step `step`, counted from 0."""
        return self.at(step * prompts_per_step, prompts_per_step)

    def at(self, place: int, count: int) -> list[Prompt]:
        """Of all epochs' prompts the ones from number `place` on."""
        return [self.prompts[i] for i in self.take(place, count)]
