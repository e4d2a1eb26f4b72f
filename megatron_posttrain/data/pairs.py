"""Preferences as tokens: pairs of answers to one prompt, and single answers with a label (KTO)."""

import hashlib
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from megatron_posttrain.data.dataset import Epochs
from megatron_posttrain.data.messages import Message, kind
from megatron_posttrain.data.rows import Row
from megatron_posttrain.data.tokenize import Conversation, Omissions, encode_conversation
from megatron_posttrain.errors import UserError

Tokens = tuple[np.ndarray, np.ndarray]  # [t] int32, [t] uint8: 1 where the token is the answer's


@dataclass(frozen=True)
class Preference:
    """Two conversations that belong together: with the chosen and the rejected answer; of a labelled row the answer
    itself, and another prompt's answer in its place."""

    conversations: list[Tokens]  # two
    margin: float = 0.0
    label: bool | None = None

    @property
    def tokens(self) -> int:
        return sum(len(tokens) for tokens, _ in self.conversations)


class PreferenceDataset(Epochs):
    """Preferences whose conversations have at most `sequence_length` tokens; of a prompt's own answers none counts.

    Args:
        rows: what `read_rows(use="preference")` returned.
        labelled: single answers with a label; a pair is read as a good and a bad one. Else pairs only.
        overlong: drop a pair with a longer conversation, or cut ends off; a cut one of which no token of an answer
            is left, or whose answers are the same then, is dropped. Counted, for `message`.

    Raises UserError: with file and line, a row of the other form, equal answers, or no common prompt; no row that fits.
    """

    def __init__(
        self,
        rows: Seq[Row],
        tokenizer: Any,
        sequence_length: int,
        *,
        labelled: bool = False,
        overlong: Literal["drop", "truncate"] = "drop",
        seed: int = 0,
        omissions: Omissions = "refuse",
    ) -> None:
        self.seed, self.sequence_length, self.overlong = seed, sequence_length, overlong
        self.tokenizer, self.omissions = tokenizer, omissions
        self.dropped = self.truncated = self.longest = 0
        read = self._labelled(rows) if labelled else map(self._pair, rows)
        self.preferences = [fitting for found in read if (fitting := self._fitting(found)) is not None]
        if not self.preferences:
            raise UserError(
                f"data.sequence_length is {sequence_length}, and none of the {len(rows)} rows fits (the longest has "
                f"{self.longest} tokens); raise it to {self.longest}, or set data.overlong=truncate"
            )
        super().__init__()

    def __len__(self) -> int:
        return len(self.preferences)

    @property
    def lengths(self) -> list[int]:
        return [len(tokens) for found in self.preferences for tokens, _ in found.conversations]

    @property
    def message(self) -> str:
        """One line about what was read, dropped and truncated."""
        counted = sum(int(mask.sum()) for found in self.preferences for _, mask in found.conversations)
        kinds = "pairs" if self.preferences[0].label is None else "labelled answers"
        return (
            f"{len(self):,} {kinds}, {sum(self.lengths):,} tokens, {counted:,} of answers; longer than "
            f"{self.sequence_length} tokens: {self.dropped:,} dropped, {self.truncated:,} truncated"
        )

    @property
    def fingerprint(self) -> str:
        """Of the tokens, what counts of them, margins and labels."""
        total = hashlib.sha256()
        for found in self.preferences:
            first, second = (len(tokens) for tokens, _ in found.conversations)
            total.update(f"{found.margin} {found.label} {first} {second}".encode())
            for tokens, mask in found.conversations:
                total.update(tokens.tobytes() + mask.tobytes())
        return total.hexdigest()[:16]

    def batch(self, step: int, count: int) -> list[int]:
        """Which of `preferences` optimizer step `step`, counted from 0, takes."""
        return self.take(step * count, count)

    def _pair(self, row: Row) -> Preference:
        if row.label is not None:
            raise UserError(f"{row.source}: a labelled answer; allowed: pairs, or algorithm.loss=kto for labelled rows")
        sides = [self._encode(row, row.messages, answer) for answer in (row.chosen, row.rejected)]
        if sides[0].token_ids == sides[1].token_ids:
            raise UserError(
                f"{row.source}: chosen and rejected are the same answer, {kind(row.chosen[0]['content'])}; a pair "
                "needs two that differ: leave the row out"
            )
        prompts = [side.token_ids[: side.loss_mask.index(1)] for side in sides]
        if prompts[0] != prompts[1]:
            raise UserError(
                f"{row.source}: chosen and rejected share no prompt: the template writes {len(prompts[0])} tokens "
                f"before the one answer, and before the other {len(prompts[1])} that are not the same"
            )
        return Preference([*map(_arrays, sides)], row.margin or 0.0)

    def _labelled(self, rows: Seq[Row]) -> list[Preference]:
        """Of every row the answer, and the next answer in the file that is another prompt's."""
        answers: list[tuple[Row, list[Message], list[Message], bool]] = []
        for row in rows:
            if row.label is None:
                answers += [(row, row.messages, row.chosen, True), (row, row.messages, row.rejected, False)]
            else:
                answers.append((row, row.messages[:-1], row.messages[-1:], row.label))
        found = []
        for number, (row, prompt, answer, label) in enumerate(answers):
            following = (answers[(number + k) % len(answers)] for k in range(1, len(answers)))
            other = next((theirs for _, their, theirs, _ in following if their != prompt), None)
            if other is None:
                raise UserError(f"{row.source}: kto compares with answers to other prompts, and all rows have this one")
            sides = [_arrays(self._encode(row, prompt, reply)) for reply in (answer, other)]
            found.append(Preference(sides, label=label))
        return found

    def _encode(self, row: Row, prompt: list[Message], answer: list[Message]) -> Conversation:
        before = [{**turn, "weight": 0} if turn["role"] == "assistant" else turn for turn in prompt]
        found = encode_conversation(self.tokenizer, [*before, *answer], row.source, row.options, self.omissions)
        if 1 not in found.loss_mask:
            raise UserError(f"{row.source}: no token of the answer {kind(answer[0]['content'])} counts")
        return found

    def _fitting(self, found: Preference) -> Preference | None:
        length = max(len(tokens) for tokens, _ in found.conversations)
        self.longest = max(self.longest, length)
        if length <= self.sequence_length:
            return found
        cut = [(tokens[: self.sequence_length], mask[: self.sequence_length]) for tokens, mask in found.conversations]
        same = found.label is None and np.array_equal(cut[0][0], cut[1][0])
        if self.overlong == "drop" or same or not all(mask.any() for _, mask in cut):
            self.dropped += 1
            return None
        self.truncated += 1
        return Preference(cut, found.margin, found.label)


def _arrays(conversation: Conversation) -> Tokens:
    return np.asarray(conversation.token_ids, np.int32), np.asarray(conversation.loss_mask, np.uint8)
