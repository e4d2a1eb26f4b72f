"""Between token ids of a completion and text."""

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from megatron_posttrain.data.template import model_of
from megatron_posttrain.data.tokenize import Conversation, encode_conversation
from megatron_posttrain.errors import UserError
from megatron_posttrain.rewards.response import REASONING, split_reasoning


def stop_token_ids(tokenizer: Any) -> tuple[int, ...]:
    """Tokens that end a response: the template's end of turn, the tokenizer's own, and the checkpoint's list.

    They differ for base models: Qwen3's template ends a turn with <|im_end|>, its base tokenizer's end is
    <|endoftext|>. `generation_config.json` beside the tokenizer may list more (Llama 3, GLM), as may that of the
    model where `model.tokenizer` names another directory.
    """
    conversation = _plain_conversation(tokenizer)
    written = [t for t, m in zip(conversation.token_ids, conversation.loss_mask, strict=True) if m]
    added = set(tokenizer.added_tokens_decoder) | _special_ids(tokenizer)
    ends = {tokenizer.eos_token_id, *_listed_ends(tokenizer.name_or_path), *_ends_of_model(tokenizer)} - {None}
    # From the end back to the turn's text: white space may follow the end of a turn.
    for token in reversed(written):
        if token in added:
            ends.add(token)
            break
        if tokenizer.decode([token]).strip():
            break
    return tuple(sorted(end for end in ends if tokenizer.convert_ids_to_tokens(end) is not None))


def _plain_conversation(tokenizer: Any) -> Conversation:
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    where = f"tokenizer {tokenizer.name_or_path}"
    try:
        return encode_conversation(tokenizer, turns, where)
    except UserError:  # some templates ask for a system turn
        return encode_conversation(tokenizer, [{"role": "system", "content": "."}, *turns], where)


def stop_message(tokenizer: Any) -> str:
    """What a run stops at, for its log."""
    ids = stop_token_ids(tokenizer)
    if not ids:
        return (
            "warning: responses stop at no token, each of them runs to the longest that is allowed: the tokenizer has "
            "no eos_token, and its chat template writes no special token behind a turn"
        )
    return "responses stop at " + ", ".join(f"{tokenizer.convert_ids_to_tokens(i)} ({i})" for i in ids)


def _listed_ends(directory: str | None) -> list[int]:
    path = Path(directory or "", "generation_config.json")
    if not directory or not path.is_file():
        return []
    try:
        ends = json.loads(path.read_text())["eos_token_id"]
    except KeyError:
        return []
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    ends = [end for end in (ends if isinstance(ends, list) else [ends]) if end is not None]
    if not all(isinstance(end, int) for end in ends):
        raise UserError(f"{path}: eos_token_id must be a token's number or a list of them, found {ends}")
    return ends


@lru_cache(maxsize=4)
def _ends_of_model(tokenizer: Any) -> list[int]:
    """The model's list, where the run's tokenizer is another directory's: those that are the same token in both."""
    directory = model_of(tokenizer)
    ends = _listed_ends(directory)
    file = Path(directory or "", "tokenizer.json")
    named = json.loads(file.read_text()).get("added_tokens", []) if ends and file.is_file() else []
    own = {token["id"]: token["content"] for token in named}
    ours = tokenizer.added_tokens_decoder
    return [end for end in ends if end in ours and own.get(end, ours[end].content) == ours[end].content]


def response_text(tokenizer: Any, token_ids: Sequence[int]) -> str:
    """The text that a reward sees: all that was generated, but the tokens that end or pad a response.

    A user's own special tokens are in it, and those that separate reasoning from answer.
    """
    dropped = _ends(tokenizer)
    return _decode(tokenizer, [t for t in token_ids if t not in dropped])


@lru_cache(maxsize=4)
def _ends(tokenizer: Any) -> frozenset[int]:
    return frozenset({*stop_token_ids(tokenizer), tokenizer.bos_token_id, tokenizer.pad_token_id} - {None})


def split_response(
    tokenizer: Any, prompt: Sequence[int], token_ids: Sequence[int], text: str | None = None
) -> tuple[str, str]:
    """Reasoning and answer of a response to `prompt`; `text`: its `response_text`, where that is known.

    The answer of a model with channels (gpt-oss) is its last `final` message. For others it follows the last
    end of reasoning; a prompt that ends with `<think>` has begun the reasoning.
    """
    added = tokenizer.get_added_vocab()
    channel, start = added.get("<|channel|>"), added.get("<|start|>")
    begun = max((i for i, t in enumerate(prompt) if t == start), default=len(prompt))  # the response's message
    if channel is not None and (channel in token_ids or channel in prompt[begun:]):
        return _split_channels(tokenizer, [*prompt[begun + 1 :], *token_ids])
    end = _decode(tokenizer, prompt[-32:]).rstrip()
    opened = next((begin for begin, _ in REASONING if end.endswith(begin)), "")
    return split_reasoning(response_text(tokenizer, token_ids) if text is None else text, opened)


def _split_channels(tokenizer: Any, token_ids: Sequence[int]) -> tuple[str, str]:
    """Messages are `<|start|>assistant<|channel|>NAME<|message|>TEXT<|end|>`; the prompt may have begun the first."""
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("start", "channel", "message")}
    ends = {tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("end", "return", "call")} | {ids["start"]}
    header: list[int] = []
    body: list[int] | None = None  # None: in a header
    messages: list[tuple[str, list[int]]] = []
    for token in token_ids:
        if token in ends or (token == ids["channel"] and body is not None):
            header, body = [], None
        elif token == ids["channel"]:
            header = []
        elif token == ids["message"]:
            body = []
            messages.append((_decode(tokenizer, header).split("<|")[0].strip(), body))
        else:
            (header if body is None else body).append(token)
    final = [i for i, (name, _) in enumerate(messages) if name == "final"]
    texts = [_decode(tokenizer, content).strip() for _, content in messages]
    reasoning = "\n".join(text for i, text in enumerate(texts) if i not in final[-1:])
    return reasoning, texts[final[-1]] if final else ""


def _decode(tokenizer: Any, token_ids: Sequence[int]) -> str:
    return tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _special_ids(tokenizer: Any) -> set[int]:
    marked = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return marked | set(tokenizer.all_special_ids)
