"""Datasets: tokenised rows, and which of them the n-th step takes."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from megatron_posttrain.data.packing import pack
from megatron_posttrain.data.rows import Message, Row
from megatron_posttrain.data.tokenize import Conversation, Omissions, encode_prompt, encode_row
from megatron_posttrain.errors import UserError


class Epochs:
    """The rows of step n: epochs, each in its own order, laid end to end, so that no row is left out.

    A pure function of (seed, step): a resumed run needs no state, and every rank computes the same.
    """

    def __init__(self, rows_per_epoch: int, make_rows: Callable[[int], Seq[Any]]) -> None:
        self.rows_per_epoch = rows_per_epoch
        self.epoch_rows = lru_cache(maxsize=2)(make_rows)  # a batch may reach into the next epoch

    def take(self, step: int, count: int) -> list[Any]:
        places = range(step * count, (step + 1) * count)
        return [self.epoch_rows(place // self.rows_per_epoch)[place % self.rows_per_epoch] for place in places]

    def steps_per_epoch(self, batch_size: int, epochs: float = 1.0) -> int:
        """Steps until every row was seen `epochs` times; the next epoch fills the last step."""
        return math.ceil(math.ceil(epochs * self.rows_per_epoch) / batch_size)


class SftDataset(Epochs):
    """Conversations for supervised training, packed into rows of at most `sequence_length` tokens.

    Args:
        rows: what `read_rows` returned; each needs an assistant turn.
        sequence_length: tokens a row may have.
        packing: several conversations a row; else one each.
        overlong: drop a longer conversation, or cut its end off. Cut ones without any token left to learn
            are dropped. Both are counted: `dropped`, `truncated`, and `message` for the log.

    Raises:
        UserError: no conversation fits, or a loss mask cannot be established (with the row's file and line).
    """

    def __init__(
        self,
        rows: Seq[Row],
        tokenizer: Any,
        sequence_length: int,
        packing: bool = True,
        overlong: Literal["drop", "truncate"] = "drop",
        seed: int = 0,
        omissions: Omissions = "refuse",
    ) -> None:
        self.sequence_length, self.packing, self.seed = sequence_length, packing, seed
        self.dropped = self.truncated = self.unlearned = 0
        tokens: list[np.ndarray] = []
        masks: list[np.ndarray] = []
        longest = 0
        for row in rows:
            conversation = encode_row(tokenizer, row, omissions)
            if 1 not in conversation.loss_mask:
                if any("weight" in message for message in row.messages):
                    self.unlearned += 1
                    continue
                raise UserError(
                    f"{row.source}: no token of an assistant in this conversation; roles found: "
                    f"{[message['role'] for message in row.messages]}"
                )
            length = len(conversation.token_ids)
            longest = max(longest, length)
            mask = np.asarray(conversation.loss_mask[:sequence_length], dtype=np.uint8)
            if length > sequence_length and (overlong == "drop" or not mask.any()):
                self.dropped += 1
                continue
            self.truncated += length > sequence_length
            tokens.append(np.asarray(conversation.token_ids[:sequence_length], dtype=np.int32))
            masks.append(mask)
        if not tokens:
            raise UserError(
                f"data.sequence_length is {sequence_length}, and none of the {len(rows)} conversations fits "
                f"(the longest has {longest} tokens); raise it to {longest}, or set data.overlong=truncate"
            )
        # One flat array: a million conversations as Python lists would take ten times the memory.
        self._tokens, self._masks = np.concatenate(tokens), np.concatenate(masks)
        self.lengths = [len(piece) for piece in tokens]
        self._starts = np.cumsum([0, *self.lengths])
        super().__init__(len(self._make_rows(0)), self._make_rows)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Conversation:
        where = slice(self._starts[index], self._starts[index + 1])
        return Conversation(self._tokens[where].tolist(), self._masks[where].tolist())

    @property
    def message(self) -> str:
        """One line about what was read, packed, dropped and truncated."""
        filled = len(self._tokens) / (self.rows_per_epoch * self.sequence_length)
        return (
            f"{len(self):,} conversations, {len(self._tokens):,} tokens, {self._masks.sum():,} with loss; "
            f"{self.rows_per_epoch:,} rows, {filled:.1%} full; longer than {self.sequence_length} tokens: "
            f"{self.dropped:,} dropped, {self.truncated:,} truncated"
            + (f"; {self.unlearned:,} left out, every turn of weight 0" if self.unlearned else "")
        )

    @property
    def fingerprint(self) -> str:
        """Of the tokens, what counts of them, and where conversations begin."""
        total = hashlib.sha256()
        for part in (self._tokens, self._masks, self._starts):
            total.update(part.tobytes())
        return total.hexdigest()[:16]

    def _make_rows(self, epoch: int) -> list[list[int]]:
        """The rows of an epoch in their order, each a list of conversation indices."""
        random = np.random.default_rng([self.seed, epoch])
        order = random.permutation(len(self.lengths)).tolist()
        if not self.packing:
            return [[i] for i in order]
        # Packing sees lengths in another order each epoch, so equally long conversations meet new neighbours;
        # the number of rows stays, because best-fit-decreasing depends on the sorted lengths alone.
        packed = pack([self.lengths[i] for i in order], self.sequence_length)
        return [[order[i] for i in packed[row]] for row in random.permutation(len(packed)).tolist()]

    def batch(self, step: int, global_batch_size: int) -> list[list[Conversation]]:
        """The rows of optimizer step `step`, counted from 0: `global_batch_size` lists of conversations."""
        return [[self[i] for i in row] for row in self.take(step, global_batch_size)]


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

    Prompts of more than `max_prompt_length` tokens are left out and counted in `dropped`.

    Raises:
        UserError: a row whose last message is an assistant's, or no prompt short enough.
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
        super().__init__(len(self.prompts), self._make_rows)

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

    def _make_rows(self, epoch: int) -> list[int]:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.prompts)).tolist()

    def batch(self, step: int, prompts_per_step: int) -> list[Prompt]:
        """The prompts of rollout step `step`, counted from 0."""
        return [self.prompts[i] for i in self.take(step, prompts_per_step)]
