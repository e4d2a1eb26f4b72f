"""Tokens of a conversation, and which of them an assistant wrote.

The text is always the whole conversation as the tokenizer's chat template renders it, tokenised at once, so
`token_ids` are those of `tokenizer.apply_chat_template(messages)`. An assistant turn is a span of characters
of that text: from the end of the generation prompt to the end of the turn's end-of-turn token. A token counts
in the loss when it overlaps a span.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from megatron_posttrain.data.messages import Message
from megatron_posttrain.data.rows import Row
from megatron_posttrain.data.template import PROBE, Omissions, Span, Template, load_tokenizer, refuse_omissions
from megatron_posttrain.errors import UserError

__all__ = [
    "Conversation", "Omissions", "TrainOn", "encode_conversation", "encode_prompt", "encode_row", "load_tokenizer",
]  # fmt: skip

TrainOn = Literal["all-assistant", "last-assistant", "everything"]
GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Conversation:
    token_ids: list[int]
    # What a token's loss is multiplied by: 1, or its turn's weight, where an assistant wrote it, its end-of-turn token
    # included; else 0
    loss_mask: list[float]


def encode_row(
    tokenizer: Any, row: Row, omissions: Omissions = "refuse", train_on: TrainOn = "all-assistant"
) -> Conversation:
    """Tokens and loss mask of a row, its tools and template options included."""
    return encode_conversation(tokenizer, row.messages, row.source, row.options, omissions, train_on)


def encode_prompt(
    tokenizer: Any,
    messages: list[Message],
    source: str = "",
    options: Mapping[str, Any] | None = None,
    omissions: Omissions = "refuse",
) -> list[int]:
    """Tokens that a model is asked to continue: the messages and the template's generation prompt."""
    template = Template(tokenizer, options or {}, source)
    messages = template.normal(messages)
    text = template.render_or_refuse(messages, prompt=True)
    if omissions == "refuse":
        refuse_omissions(template, messages, text)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def encode_conversation(
    tokenizer: Any,
    messages: list[Message],
    source: str = "",
    options: Mapping[str, Any] | None = None,
    omissions: Omissions = "refuse",
    train_on: TrainOn = "all-assistant",
) -> Conversation:
    """Tokens and loss mask of a conversation, exact for every assistant turn.

    Templates with `{% generation %}` blocks say which text is the assistant's. For others a turn begins where
    `messages[:i]` with the generation prompt ends, and its end is found by rendering the conversation once
    more with a probe in the turn's place: templates rewrite turns that are not the last (Qwen3 strips their
    reasoning), so `messages[:i + 1]` need not be a prefix of the whole.

    Args:
        train_on: tokens that count: of all assistant turns, of the last of them, or everything, what the template
            writes and other turns included. A turn's `weight` is that of its tokens.
        options: what the template gets beside the messages: `tools` and keys of its own.
        omissions: what to do with a conversation of which the template leaves something out.

    Raises UserError: the template refuses the conversation, leaves something of it out, or a turn's span cannot be
    established (`source` says where).
    """
    template = Template(tokenizer, options or {}, source)
    messages = template.normal(messages)
    text = template.render_or_refuse(messages)
    spans = _weighted_spans(template, messages, text, train_on)
    if omissions == "refuse":
        refuse_omissions(template, messages, text)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return Conversation(encoding["input_ids"], _mask(encoding["offset_mapping"], spans, train_on == "everything"))


def _weighted_spans(
    template: Template, messages: list[Message], text: str, train_on: TrainOn
) -> list[tuple[Span, float]]:
    """What counts of the text, and how much; with `everything` only where that is not 1."""
    turns = _assistants(messages)
    weights = {i: message["weight"] for i, message in enumerate(messages) if "weight" in message}
    if train_on == "everything":
        if others := sorted(weights.keys() - set(turns)):
            raise UserError(
                f"{template.source}: messages[{others[0]}].weight would be ignored: data.train_on=everything counts "
                "every token but those of assistant turns with a weight of their own; remove it"
            )
        found = _find_spans(template, messages, text) if weights else {}
        return [(span, weights.get(i, 1)) for i, span in found.items()]
    if train_on == "last-assistant":
        weights |= dict.fromkeys(turns[:-1], 0)
    if not GENERATION_BLOCK.search(template.text):
        return [(span, weights.get(i, 1)) for i, span in _find_spans(template, messages, text).items()]
    marked = template.apply(messages, spans=True)[1]
    own = {i: span for i, span in _find_spans(template, messages, text).items() if i in weights} if weights else {}
    return [
        ((a, b), next((weights[i] for i, (start, end) in own.items() if a < end and start < b), 1)) for a, b in marked
    ]


def _assistants(messages: list[Message]) -> list[int]:
    return [i for i, message in enumerate(messages) if message["role"] == "assistant"]


def _mask(offsets: list[Span], spans: list[tuple[Span, float]], everything: bool) -> list[float]:
    """Of every token the weight of the span that it overlaps; offsets grow along the text."""
    starts, ends = [start for start, _ in offsets], [end for _, end in offsets]
    mask: list[float] = [int(everything)] * len(offsets)
    for (start, end), weight in spans:
        tokens = range(bisect_right(ends, start), bisect_left(starts, end))
        mask[tokens.start : tokens.stop] = [weight] * len(tokens)
    return mask


def _find_spans(template: Template, messages: list[Message], text: str) -> dict[int, Span]:
    """The span of every assistant turn, by its place in the conversation."""
    spans: dict[int, Span] = {}
    last = 0
    for i in _assistants(messages):
        span = (
            _span_by_probe(template, messages, i, text)
            or _span_by_prefix(template, messages, i, text)
            or _span_by_arguments(template, messages, i, text)
        )
        if span is None or span[0] < last:
            raise UserError(
                f"{template.source}: cannot tell which text of messages[{i}] is the assistant's in what the chat "
                "template makes of it; use a template with {% generation %} blocks"
            )
        spans[i] = span
        last = span[1]
    return spans


def _span_by_probe(template: Template, messages: list[Message], i: int, text: str) -> Span | None:
    """Bound turn i by what stays the same around it when a probe takes its place.

    What follows the probe must be the end of `text`, so the turn ends where that begins. It starts where the
    generation prompt ends or, where the full text has another header than the prompt, where the probe does.
    """
    probe = {"role": "assistant", "content": PROBE}
    probed = template.render([*messages[:i], probe, *messages[i + 1 :]])
    if probed is None or probed.count(PROBE) != 1:
        return None
    before, after = probed.split(PROBE)
    end = len(text) - len(after)
    start = _prompt_end(template, messages, i, text)
    if start is None and text.startswith(before):
        start = len(before)
    if start is None:
        start = _header_end(template, before, text)
    if start is None or start > end or not text.endswith(after):
        return None
    return start, _end_of_turn(template, messages[:i], text, end)


def _span_by_arguments(template: Template, messages: list[Message], i: int, text: str) -> Span | None:
    """For tool calls after which the template rewrites what came before: a probe among the last arguments.

    What follows the probe is, behind the end of the arguments, the end of `text`; the turn ends with the first
    special token there, or with the template's own end of turn where only special tokens are before it.
    """
    calls = messages[i].get("tool_calls")
    if not calls:
        return None
    function = calls[-1].get("function", calls[-1])
    function = {**function, "arguments": {**(function.get("arguments") or {}), "probe": PROBE}}
    call = {**calls[-1], "function": function} if "function" in calls[-1] else function
    probed = template.render([*messages[:i], {**messages[i], "tool_calls": [*calls[:-1], call]}, *messages[i + 1 :]])
    if probed is None or probed.count(PROBE) != 1:
        return None
    before, after = probed.split(PROBE)
    start = _prompt_end(template, messages, i, text) or _header_end(template, before, text)
    special = re.search(_special_tokens(template.tokenizer), after)
    if start is None or special is None or not text.endswith(after[special.start() :]):
        return None
    end = len(text) - len(after) + special.start()
    if end < start:
        return None
    own = _usual_tail(template.tokenizer, template.text)
    closing = re.findall(_special_tokens(template.tokenizer), own or "")
    run = re.compile(rf"(?:{_special_tokens(template.tokenizer)})+").match(text, end)
    if closing and run and closing[-1] in run.group():
        return start, end + run.group().index(closing[-1]) + len(closing[-1])
    return start, end + len(special.group())


def _header_end(template: Template, before: str, text: str) -> int | None:
    """End of a turn's header where the text up to it, `before`, differs from the whole text behind the header.

    Reasoning that only one of the two has begins there, or the generation prompt opens or closes some.
    """
    for header in _usual_headers(template.tokenizer, template.text):
        end = before.rfind(header) + len(header)
        if end >= len(header) and text.startswith(before[:end]):
            return end
    return None


@lru_cache(maxsize=4)
def _usual_headers(tokenizer: Any, template: str) -> list[str]:
    """What `template` writes between a question and a turn that is not the last, and as a generation prompt."""
    asked = [{"role": "user", "content": "?"}]
    plain = Template(tokenizer)
    question = plain.render(asked) or ""
    whole = plain.render([*asked, {"role": "assistant", "content": PROBE}, *asked]) or ""
    texts = [plain.render(asked, prompt=True) or "", whole.split(PROBE)[0]]
    return [x[len(question) :] for x in texts if question and x.startswith(question) and len(x) > len(question)]


def _end_of_turn(template: Template, before: list[Message], text: str, end: int) -> int:
    """`end` of a turn's content moved behind the special tokens that close the turn.

    A special token that follows may also open the next turn (GLM has no other end): only as many count as the
    turn writes when it is the last one.
    """
    special = _special_tokens(template.tokenizer)
    tail = _usual_tail(template.tokenizer, template.text) or _render_tail(template, before)
    own = re.match(rf"\s*(?:{special})+", tail or "")
    if own and text.startswith(own.group(), end):
        return end + len(own.group())
    # Another token may close a turn that is not the last (gpt-oss).
    other = re.compile(rf"\s*(?:{special})").match(text, end)
    return other.end() if own and other else end


def _span_by_prefix(template: Template, messages: list[Message], i: int, text: str) -> Span | None:
    """For turns whose place no probe can take (tool calls): valid where nothing earlier is rewritten."""
    start = _prompt_end(template, messages, i, text)
    up_to = template.render(messages[: i + 1])
    if start is None or up_to is None or len(up_to) < start or not text.startswith(up_to):
        return None
    # White space after the end-of-turn token is the template's, not the model's.
    return start, start + len(text[start : len(up_to)].rstrip())


def _prompt_end(template: Template, messages: list[Message], i: int, text: str) -> int | None:
    """End of the generation prompt before turn i, when the full text begins with it."""
    prompt = template.render(messages[:i], prompt=True)
    return len(prompt) if prompt and text.startswith(prompt) else None


@lru_cache(maxsize=4)
def _usual_tail(tokenizer: Any, template: str) -> str | None:
    """What `template` writes after the content of a last turn; asked once, with a plain conversation."""
    return _render_tail(Template(tokenizer), [{"role": "user", "content": "?"}])


def _render_tail(template: Template, before: list[Message]) -> str | None:
    alone = template.render([*before, {"role": "assistant", "content": PROBE}])
    return alone and alone.rpartition(PROBE)[2]


@lru_cache(maxsize=4)
def _special_tokens(tokenizer: Any) -> str:
    """A regular expression of the tokenizer's special tokens."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    special.add(tokenizer.eos_token or "")
    return "|".join(map(re.escape, sorted(special - {""}, key=len, reverse=True))) or r"(?!)"
