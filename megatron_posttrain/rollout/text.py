"""Between token ids of a completion and text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_posttrain.data.tokenize import encode_conversation

# Kept in a response's text although some tokenizers call them special: rewards look for them.
REASONING = ("<think>", "</think>")


def stop_token_ids(tokenizer: Any) -> tuple[int, ...]:
    """Tokens that end a response: the one with which the chat template ends a turn, and the tokenizer's own.

    They differ for base models: Qwen3's template ends a turn with <|im_end|>, its base tokenizer's end is
    <|endoftext|>.
    """
    turn = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    conversation = encode_conversation(tokenizer, turn)
    written = [t for t, m in zip(conversation.token_ids, conversation.loss_mask, strict=True) if m]
    ends = set(written[-1:]) & _special_ids(tokenizer)
    return tuple(sorted(ends | ({tokenizer.eos_token_id} - {None})))


def response_text(tokenizer: Any, token_ids: Sequence[int]) -> str:
    """The text that a reward sees: no special tokens, except `<think>` and `</think>`."""
    dropped = _special_ids(tokenizer) - set(tokenizer.convert_tokens_to_ids(list(REASONING)))
    kept = [t for t in token_ids if t not in dropped]
    return tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _special_ids(tokenizer: Any) -> set[int]:
    marked = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return marked | set(tokenizer.all_special_ids)
