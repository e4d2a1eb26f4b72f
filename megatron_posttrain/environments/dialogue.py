"""Between an environment's messages and tokens: calls as a chat template writes them, and what follows a turn."""

import json
import re
from collections.abc import Collection, Mapping
from typing import Any, Literal

from megatron_posttrain.data.messages import BadRow, Message, read_messages
from megatron_posttrain.data.template import PROBE, Template
from megatron_posttrain.environments.protocol import Call, Environment
from megatron_posttrain.errors import UserError
from megatron_posttrain.rewards.calls import HERMES

CallForm = Literal["hermes", "llama"]
_QUESTION: list[Message] = [{"role": "user", "content": "?"}]


def call_form(tokenizer: Any, tools: list[dict[str, Any]]) -> CallForm | None:
    """How a template writes calls: `<tool_call>{"name", "arguments"}</tool_call>` (Hermes, Qwen), or a turn that is
    `{"name", "parameters"}` (Llama 3); None: otherwise."""
    call = {"id": "123456789", "type": "function", "function": {"name": "probe", "arguments": {"key": "value"}}}
    asked = [*_QUESTION, {"role": "assistant", "content": "", "tool_calls": [call]}]
    text = Template(tokenizer, {"tools": tools}).render(asked) or ""
    written = re.search(r'(<tool_call>\s*)?\{\s*"name":\s*"probe",\s*"(arguments|parameters)":\s*\{', text)
    if written is None:
        return None
    return "hermes" if written[1] else "llama" if written[2] == "parameters" else None


def read_calls(form: CallForm | None, text: str) -> tuple[Call, ...]:
    """The tool calls of a turn, without its reasoning."""
    if form == "hermes":
        return tuple(_call(found, "arguments") for found in HERMES.findall(text))
    text = text.removeprefix("<|python_tag|>").strip()
    return (_call(text, "parameters"),) if form == "llama" and text.startswith('{"name"') else ()


def _call(text: str, key: str) -> Call:
    try:
        value = json.loads(text)
        name, arguments = value["name"], value.get(key, {})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        return Call("", error=f'a call must be JSON {{"name": ..., "{key}": {{...}}}}: {error}')
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return Call(str(name), error=f'"name" must be a string and "{key}" an object')
    return Call(name, arguments)


def following_tokens(
    tokenizer: Any, options: Mapping[str, Any], asked: list[Message], said: Any, ends: Collection[int]
) -> list[int]:
    """Tokens that the template writes between a turn of the model that has ended and its next one.

    They are what follows the turn where the template renders the whole conversation. What came before is not
    tokenised again, and is not rewritten as templates do that strip the reasoning of earlier turns.

    Args:
        asked: messages before the turn.
        said: what an environment answered.
        ends: tokens that end a turn, one of which the model has written.

    Raises BadRow: these are no messages, or the template cannot write them.
    """
    messages = read_messages(said, "reply")
    if not messages:
        raise BadRow("reply is an empty list; it must be messages, or Done()")
    turn: Message = {"role": "assistant", "content": PROBE}
    text = Template(tokenizer, options).render([*asked, turn, *messages], prompt=True)
    if text is None or text.count(PROBE) != 1:
        raise BadRow(f"the chat template does not write {[m['role'] for m in messages]} after an assistant's turn")
    encoding = tokenizer(text[text.index(PROBE) :], add_special_tokens=False, return_offsets_mapping=True)
    spans = zip(encoding["input_ids"], encoding["offset_mapping"], strict=True)
    tokens = [token for token, (start, _) in spans if start >= len(PROBE)]
    end = next((i for i, token in enumerate(tokens) if token in ends), -1)
    return tokens[end + 1 :]


def check_dialogue(tokenizer: Any, environment: Environment, ends: Collection[int]) -> CallForm | None:
    """The form of calls where there are tools. Raises UserError where the template cannot carry the conversation."""
    where = f"tokenizer {tokenizer.name_or_path}: its chat template"
    tools = environment.tools
    form = call_form(tokenizer, tools) if tools else None
    if tools and form is None:
        raise UserError(
            f"{where} writes tool calls in a form that is not known here, and the environment has tools; allowed: "
            '<tool_call>{"name", "arguments"}</tool_call> (Hermes, Qwen), or {"name", "parameters"} (Llama 3)'
        )
    answer: Message = {"role": "tool" if tools else "user", "name": "probe", "content": "!"}
    try:
        following_tokens(tokenizer, {"tools": tools}, _QUESTION, [answer], ends)
    except BadRow as error:
        raise UserError(f"{where}: {error}") from None
    return form
