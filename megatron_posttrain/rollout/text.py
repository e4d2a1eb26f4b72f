"""Between token ids of a completion and text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_posttrain.data.tokenize import encode_conversation

# Kept in a response's text although some tokenizers call them special: rewards look for them.
REASONING = ("<think>", "</think>")


def stop_token_ids(tokenizer: Any) -> tuple[int, ...]:
    """Tokens that end a response: the template's end of turn, the tokenizer's own, and the checkpoint's list.

    They differ for base models: Qwen3's template ends a turn with <|im_end|>, its base tokenizer's end is
    <|endoftext|>. `generation_config.json` beside the tokenizer may list more (Llama 3, GLM).
    """
    turn = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    conversation = encode_conversation(tokenizer, turn)
    written = [t for t, m in zip(conversation.token_ids, conversation.loss_mask, strict=True) if m]
    added = set(tokenizer.added_tokens_decoder) | _special_ids(tokenizer)
    ends = {tokenizer.eos_token_id, *_listed_ends(tokenizer)} - {None}
    # From the end back to the turn's text: white space may follow the end of a turn.
    for token in reversed(written):
        if token in added:
            ends.add(token)
            break
        if tokenizer.decode([token]).strip():
            break
    return tuple(sorted(ends))


def stop_message(tokenizer: Any) -> str:
    """What a run stops at, for its log."""
    ids = stop_token_ids(tokenizer)
    return "responses stop at " + ", ".join(f"{tokenizer.convert_ids_to_tokens(i)} ({i})" for i in ids)


def _listed_ends(tokenizer: Any) -> list[int]:
    path = Path(str(tokenizer.name_or_path or ""), "generation_config.json")
    if not tokenizer.name_or_path or not path.is_file():
        return []
    ends = json.loads(path.read_text()).get("eos_token_id")
    return ends if isinstance(ends, list) else [] if ends is None else [ends]


def response_text(tokenizer: Any, token_ids: Sequence[int]) -> str:
    """The text that a reward sees: no special tokens, except `<think>` and `</think>`."""
    dropped = _special_ids(tokenizer) - set(tokenizer.convert_tokens_to_ids(list(REASONING)))
    kept = [t for t in token_ids if t not in dropped]
    return tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _special_ids(tokenizer: Any) -> set[int]:
    marked = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return marked | set(tokenizer.all_special_ids)
