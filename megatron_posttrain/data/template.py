"""A tokenizer's chat template: rendering a conversation, and what of it the rendered text lacks."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import jinja2

from megatron_posttrain.data.messages import BadRow, Message, normal_calls
from megatron_posttrain.errors import UserError

Span = tuple[int, int]
Omissions = Literal["refuse", "allow"]

# Takes a text's place to find where it goes. Private-use characters: in no conversation, and left alone by a
# template that strips white space or looks for tags.
PROBE = "\ue5f0\ue5f1\ue5f2"
# What a template raises by itself, and what its code raises on messages that it was not written for.
TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError)
# Templates write the date (Llama 3.2, gpt-oss); a run that crosses midnight keeps its own, resumed ones that of the
# first attempt: rows are the same tokens to the end.
_started = datetime.now()
# Keys under which templates look for a turn's reasoning.
REASONING = ("reasoning_content", "thinking", "reasoning")
SAMPLE = "Two words,  2 spaces.\n\n\tx = 1234; \u00e9\u4e16\U0001f600"
NOT_THE_TEMPLATES = ("weight",)
MODEL = "model_directory"  # attribute of a tokenizer


def started() -> datetime:
    """The moment that templates write as now."""
    return _started


def keep_started(moment: datetime) -> None:
    """Templates write `moment` from here on."""
    global _started
    _started = moment


VOCABULARIES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken")


def load_tokenizer(directory: str | Path, model: str | Path | None = None) -> Any:
    """The fast tokenizer of a local directory (or of a hub id in the local cache), with its chat template.

    `model`: directory of the model that is used with it, where it is another one; `model_of` knows it.
    Raises UserError: nothing to load there, no chat template, or a tokenizer that cannot report offsets.
    """
    from transformers import AutoTokenizer

    if Path(directory).is_dir() and not any(next(Path(directory).glob(name), None) for name in VOCABULARIES):
        # transformers makes one without words from config.json's model_type
        raise UserError(f"tokenizer {directory}: no {' or '.join(VOCABULARIES)} is there; copy it from its model")
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
    tokenizer = _as_stored(tokenizer, directory)
    setattr(tokenizer, MODEL, None if model is None else str(model))
    return tokenizer


def model_of(tokenizer: Any) -> str | None:
    """Directory of the model that a tokenizer of another directory was loaded for."""
    found: str | None = getattr(tokenizer, MODEL, None)
    return found


def _as_stored(tokenizer: Any, directory: str | Path) -> Any:
    """The tokenizer that `tokenizer.json` describes.

    transformers 5 builds some classes anew from the vocabulary: DeepSeek-V3's (`LlamaTokenizerFast` in its
    config) then loses every space.
    """
    from transformers import PreTrainedTokenizerFast

    if type(tokenizer) is PreTrainedTokenizerFast:
        return tokenizer
    try:
        stored = PreTrainedTokenizerFast.from_pretrained(str(directory), local_files_only=True)
    except (OSError, ValueError):  # there is no tokenizer.json: nothing to differ from
        return tokenizer
    same = stored.encode(SAMPLE, add_special_tokens=False) == tokenizer.encode(SAMPLE, add_special_tokens=False)
    return tokenizer if same else stored


@dataclass(frozen=True)
class Template:
    """A tokenizer's template with what a row gives it beside the messages (tools, options)."""

    tokenizer: Any
    options: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""  # of the row, for messages

    @property
    def text(self) -> str:
        """The template itself: of several named ones, as transformers chooses (`default`, `tool_use`)."""
        try:
            return self.tokenizer.get_chat_template(tools=self.options.get("tools"))
        except ValueError as error:
            raise UserError(f"{self.source}: {error}") from error

    def apply(self, messages: list[Message], prompt: bool = False, spans: bool = False) -> tuple[str, list[Span]]:
        """The rendered text and, with `spans`, what its `{% generation %}` blocks mark."""
        from transformers.utils.chat_template_utils import render_jinja_template

        extra = {key: value for key, value in self.options.items() if key != "tools"}
        texts, found = render_jinja_template(
            conversations=[[self._known(message) for message in messages]],
            tools=self.options.get("tools"),
            chat_template=self.text,
            add_generation_prompt=prompt,
            return_assistant_tokens_mask=spans,
            **{**self.tokenizer.special_tokens_map, "strftime_now": _started.strftime, **extra},
        )
        return texts[0], [tuple(span) for span in found[0]] if spans else []

    def render(self, messages: list[Message], prompt: bool = False) -> str | None:
        """The rendered text; None when the template refuses these messages."""
        try:
            return self.apply(messages, prompt)[0]
        except TEMPLATE_ERRORS:
            return None

    def render_or_refuse(self, messages: list[Message], prompt: bool = False) -> str:
        try:
            text = self.apply(messages, prompt)[0]
        except TEMPLATE_ERRORS as error:
            raise UserError(
                f"{self.source}: the tokenizer's chat template refuses this conversation: {error}"
            ) from error
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = text[error.start]
            raise UserError(
                f"{self.source}: {half!a} is half of a character (a cut emoji?), found after "
                f"{text[max(error.start - 20, 0) : error.start]!r}; mend or leave out the row"
            ) from None
        return text

    def _known(self, message: Message) -> Message:
        """The message as the template reads it: its reasoning under the key that the template knows."""
        message = {key: value for key, value in message.items() if key not in NOT_THE_TEMPLATES}
        given = next((key for key in REASONING if key in message), None)
        if given and given not in self.text:
            known = next((key for key in REASONING if f".{key}" in self.text or f"'{key}'" in self.text), given)
            message[known] = message.pop(given)
        return message

    def normal(self, messages: list[Message]) -> list[Message]:
        try:
            return normal_calls(messages)
        except BadRow as error:
            raise UserError(f"{self.source}: {error}") from None


def refuse_omissions(template: Template, messages: list[Message], text: str) -> None:
    """Refuse a conversation of which the rendered text lacks a message's text, a tool, a tool call or an option.

    Reasoning of earlier turns may be left out, as reasoning models' templates do; that of the last may not.
    Raises UserError: with the row and what is left out.
    """
    lost = next(_omitted(template, messages, text), None)
    if lost:
        raise UserError(
            f"{template.source}: the chat template leaves out {lost}; change the row, use a template that "
            "writes it (model.tokenizer may name another), or set data.omissions=allow"
        )


def _omitted(template: Template, messages: list[Message], text: str) -> Iterator[str]:
    probed, wanted = _probed(messages)
    again = template.render(probed)
    if again is not None:
        yield from (what for probe, what in wanted.items() if probe not in again)
    for i, message in enumerate(messages):
        # A tool's result may be written in another form (as JSON, parsed).
        if message["role"] != "tool" and not _has_lines(text, _split(message)[1]):
            yield f"a part of the text of messages[{i}] ({message['role']})"
    if messages[-1]["role"] == "assistant" and not _has_lines(text, _split(messages[-1])[0]):
        yield f"the reasoning of the last turn, messages[{len(messages) - 1}]"
    for tool in template.options.get("tools") or []:
        name = tool.get("function", tool).get("name", "")
        if name not in text:
            yield f"the tool {name}"
    for key, value in template.options.items():
        if (
            key != "tools"
            and value not in (None, "", [], {})
            and not re.search(rf"\b{re.escape(key)}\b", template.text)
        ):
            yield f"chat_template_kwargs.{key}, which it does not read"


def _probed(messages: list[Message]) -> tuple[list[Message], dict[str, str]]:
    """The conversation with a probe in place of each text and tool's name; what each probe stands for."""
    probed, wanted = [], {}
    for i, message in enumerate(messages):
        message = dict(message)
        if _split(message)[1].strip():
            message["content"] = f"{PROBE}{i}{PROBE}"
            wanted[message["content"]] = f"the text of messages[{i}] ({message['role']})"
        calls = []
        for n, call in enumerate(message.get("tool_calls") or []):
            name = f"{PROBE}{i}.{n}{PROBE}"
            wanted[name] = f"messages[{i}].tool_calls[{n}], a call of {call.get('function', call).get('name')}"
            calls.append(
                {**call, "function": {**call["function"], "name": name}}
                if "function" in call
                else {**call, "name": name}
            )
        if calls:
            message["tool_calls"] = calls
        apart = next((key for key in REASONING if message.get(key)), None)
        if apart and i == len(messages) - 1:
            message[apart] = f"{PROBE}reasoning{PROBE}"
            wanted[message[apart]] = f"the reasoning of the last turn, messages[{i}]"
        probed.append(message)
    return probed, wanted


def _split(message: Message) -> tuple[str, str]:
    """A turn's reasoning and what follows it."""
    content = message.get("content") or ""
    if message["role"] != "assistant":
        return "", content
    apart = next((message[key] for key in REASONING if message.get(key)), "")
    before, closed, after = content.rpartition("</think>")
    return (before.replace("<think>", ""), after) if closed else (apart, content)


def _has_lines(text: str, said: str) -> bool:
    """Whether every line is in the text, as it is or as JSON writes it; templates strip white space."""
    lines = (line.strip() for line in said.splitlines())
    return said.strip() in text or all(
        line in text or json.dumps(line, ensure_ascii=False)[1:-1] in text or json.dumps(line)[1:-1] in text
        for line in lines
    )
