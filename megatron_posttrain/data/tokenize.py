"""Tokens of a conversation, and which of them an assistant wrote.

The text is always the whole conversation as the tokenizer's chat template renders it, tokenised at once, so
`token_ids` are those of `tokenizer.apply_chat_template(messages)`. An assistant turn is a span of characters
of that text: from the end of the generation prompt to the end of the turn's end-of-turn token. A token counts
in the loss when it overlaps a span.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2

from megatron_posttrain.data.rows import Message
from megatron_posttrain.errors import UserError

Span = tuple[int, int]

# Takes a turn's place to find its end. Private-use characters: in no conversation, and left alone by a
# template that strips white space or looks for tags.
PROBE = "\ue5f0\ue5f1\ue5f2"
# What a template raises by itself, and what its code raises on messages that it was not written for.
TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError)
GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Conversation:
    token_ids: list[int]
    loss_mask: list[int]  # 1 where an assistant wrote the token, its end-of-turn token included


def load_tokenizer(directory: str | Path) -> Any:
    """The fast tokenizer of a local directory (or of a hub id in the local cache), with its chat template.

    Raises:
        UserError: nothing to load there, no chat template, or a tokenizer that cannot report offsets.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"tokenizer {directory}: cannot be loaded: {error}") from error
    if not tokenizer.chat_template:
        raise UserError(
            f"tokenizer {directory}: it has no chat template; add chat_template.jinja to the directory, or "
            "name a tokenizer that has one in model.tokenizer"
        )
    if not tokenizer.is_fast:
        raise UserError(f"tokenizer {directory}: a fast tokenizer (tokenizer.json) is needed for the loss mask")
    return tokenizer


def encode_prompt(tokenizer: Any, messages: list[Message], source: str = "") -> list[int]:
    """Tokens that a model is asked to continue: the messages and the template's generation prompt."""
    text = _render_or_refuse(tokenizer, messages, source, prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def encode_conversation(tokenizer: Any, messages: list[Message], source: str = "") -> Conversation:
    """Tokens and loss mask of a conversation, exact for every assistant turn.

    Templates with `{% generation %}` blocks say which text is the assistant's. For others a turn begins where
    `messages[:i]` with the generation prompt ends, and its end is found by rendering the conversation once
    more with a probe in the turn's place: templates rewrite turns that are not the last (Qwen3 strips their
    reasoning), so `messages[:i + 1]` need not be a prefix of the whole.

    Raises:
        UserError: the template refuses the conversation, or a turn's span cannot be established (`source`
            says where).
    """
    text = _render_or_refuse(tokenizer, messages, source)
    if GENERATION_BLOCK.search(tokenizer.get_chat_template()):
        spans = _apply_template(tokenizer, messages, spans=True)[1]
    else:
        spans = _find_spans(tokenizer, messages, text, source)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return Conversation(encoding["input_ids"], _mask(encoding["offset_mapping"], spans))


def _mask(offsets: list[Span], spans: list[Span]) -> list[int]:
    """1 for every token that overlaps a span; offsets grow along the text."""
    starts, ends = [start for start, _ in offsets], [end for _, end in offsets]
    mask = [0] * len(offsets)
    for start, end in spans:
        tokens = range(bisect_right(ends, start), bisect_left(starts, end))
        mask[tokens.start : tokens.stop] = [1] * len(tokens)
    return mask


# ---- spans without markers ---------------------------------------------------------------------------------


def _find_spans(tokenizer: Any, messages: list[Message], text: str, source: str) -> list[Span]:
    spans: list[Span] = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        span = _span_by_probe(tokenizer, messages, i, text) or _span_by_prefix(tokenizer, messages, i, text)
        if span is None or span[0] < (spans[-1][1] if spans else 0):
            raise UserError(
                f"{source}: cannot tell which text of messages[{i}] is the assistant's in what the chat "
                "template makes of it; use a template with {% generation %} blocks"
            )
        spans.append(span)
    return spans


def _span_by_probe(tokenizer: Any, messages: list[Message], i: int, text: str) -> Span | None:
    """Bound turn i by what stays the same around it when a probe takes its place.

    What follows the probe must be the end of `text`, so the turn ends where that begins. It starts where the
    generation prompt ends or, where the full text has another header than the prompt, where the probe does.
    """
    probe = {"role": "assistant", "content": PROBE}
    probed = _render(tokenizer, [*messages[:i], probe, *messages[i + 1 :]])
    if probed is None or probed.count(PROBE) != 1:
        return None
    before, after = probed.split(PROBE)
    end = len(text) - len(after)
    start = _prompt_end(tokenizer, messages, i, text)
    if start is None and text.startswith(before):
        start = len(before)
    if start is None or start > end or not text.endswith(after):
        return None
    return start, _end_of_turn(tokenizer, messages[:i], text, end)


def _end_of_turn(tokenizer: Any, before: list[Message], text: str, end: int) -> int:
    """`end` of a turn's content moved behind the special tokens that close the turn.

    A special token that follows may also open the next turn (GLM has no other end): only as many count as the
    turn writes when it is the last one.
    """
    special = _special_tokens(tokenizer)
    tail = _usual_tail(tokenizer, tokenizer.chat_template) or _render_tail(tokenizer, before)
    own = re.match(rf"\s*(?:{special})+", tail or "")
    if own and text.startswith(own.group(), end):
        return end + len(own.group())
    # Another token may close a turn that is not the last (gpt-oss).
    other = re.compile(rf"\s*(?:{special})").match(text, end)
    return other.end() if own and other else end


def _span_by_prefix(tokenizer: Any, messages: list[Message], i: int, text: str) -> Span | None:
    """For turns whose place no probe can take (tool calls): valid where nothing earlier is rewritten."""
    start = _prompt_end(tokenizer, messages, i, text)
    up_to = _render(tokenizer, messages[: i + 1])
    if start is None or up_to is None or len(up_to) < start or not text.startswith(up_to):
        return None
    # White space after the end-of-turn token is the template's, not the model's.
    return start, start + len(text[start : len(up_to)].rstrip())


def _prompt_end(tokenizer: Any, messages: list[Message], i: int, text: str) -> int | None:
    """End of the generation prompt before turn i, when the full text begins with it."""
    prompt = _render(tokenizer, messages[:i], prompt=True)
    return len(prompt) if prompt and text.startswith(prompt) else None


@lru_cache(maxsize=4)
def _usual_tail(tokenizer: Any, template: str) -> str | None:
    """What `template` writes after the content of a last turn; asked once, with a plain conversation."""
    return _render_tail(tokenizer, [{"role": "user", "content": "?"}])


def _render_tail(tokenizer: Any, before: list[Message]) -> str | None:
    alone = _render(tokenizer, [*before, {"role": "assistant", "content": PROBE}])
    return alone and alone.rpartition(PROBE)[2]


@lru_cache(maxsize=4)
def _special_tokens(tokenizer: Any) -> str:
    """A regular expression of the tokenizer's special tokens."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    special.add(tokenizer.eos_token or "")
    return "|".join(map(re.escape, sorted(special - {""}, key=len, reverse=True))) or r"(?!)"


# ---- rendering ---------------------------------------------------------------------------------------------


def _render_or_refuse(tokenizer: Any, messages: list[Message], source: str, prompt: bool = False) -> str:
    try:
        return _apply_template(tokenizer, messages, prompt)[0]
    except TEMPLATE_ERRORS as error:
        raise UserError(f"{source}: the tokenizer's chat template refuses this conversation: {error}") from error


def _render(tokenizer: Any, messages: list[Message], prompt: bool = False) -> str | None:
    """The rendered text; None when the template refuses these messages."""
    try:
        return _apply_template(tokenizer, messages, prompt)[0]
    except TEMPLATE_ERRORS:
        return None


def _apply_template(
    tokenizer: Any, messages: list[Message], prompt: bool = False, spans: bool = False
) -> tuple[str, list[Span]]:
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, found = render_jinja_template(
        conversations=[messages],
        chat_template=tokenizer.get_chat_template(),
        add_generation_prompt=prompt,
        return_assistant_tokens_mask=spans,
        **tokenizer.special_tokens_map,
    )
    return texts[0], [tuple(span) for span in found[0]] if spans else []
