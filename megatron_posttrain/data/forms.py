"""The row forms of public data: which keys make one, what it is for, how it becomes messages."""

import itertools
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_posttrain.data.columns import Columns, Record, proposal
from megatron_posttrain.data.messages import (
    CALL,
    ROLES,
    BadRow,
    LeftOut,
    Message,
    kind,
    read_message,
    read_messages,
    read_object,
)

ALLOWED = {
    "sft": "{messages: [{role, content}...]}, {prompt, response or completion}, {instruction, input, output} (Alpaca), "
    "{instruction, context, response} (Dolly), {conversations: [{from, value}...]} (ShareGPT), "
    "{query, tools, answers} (xLAM)",
    "other": "for reinforcement learning {messages or prompt or question or problem, answer, metadata}",
    "preference": "for preferences {prompt or messages, chosen, rejected}, {messages, rejected_response or "
    "rejected_messages}, {instruction, output_1, output_2, preference}, {context, response1, response2, "
    "overall_preference}, or for KTO {prompt or messages, response, label}",
}


def description(use: str) -> str:
    """The forms that are read for the `use` of a `Reader`."""
    wanted = [ALLOWED[use]] if use in ("sft", "preference") else [*ALLOWED.values()][: None if use == "any" else 2]
    return "allowed: " + "; ".join(wanted)


@dataclass(frozen=True)
class Form:
    """A row form: the keys that a row of it has, and how its fields are read."""

    name: str
    use: str  # sft | rl | preference
    keys: tuple[str, ...]
    reader: Callable[..., dict[str, Any]]  # of (record, *keys)
    more: tuple[str, ...] = ()  # keys that are read when they are there

    def read(self, record: Record) -> dict[str, Any]:
        """A row's fields. Raises BadRow."""
        return self.reader(record, *self.keys)

    @property
    def reads(self) -> tuple[str, ...]:
        return (*self.keys, *self.more)


def _text(record: Record, key: str, default: str | None = None) -> str:
    value = record.get(key, default)
    if not isinstance(value, str):
        raise BadRow(f"{key} must be a string, found {kind(value)}")
    return value


def _reply(value: Any, key: str, role: str = "assistant") -> list[Message]:
    """An answer: a text, a message or messages."""
    if isinstance(value, list | dict) or (isinstance(value, str) and STORED.match(value)):
        return read_messages(value, key)
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    raise BadRow(f"{key} must be a string, found {kind(value)}")


def _turns(value: Any, key: str) -> list[Message]:
    """A prompt: a text, a transcript or messages."""
    return (transcript(value) if isinstance(value, str) else []) or _reply(value, key, "user")


# Messages, as tables store them.
STORED = re.compile(r'\s*\[\s*\{\s*"(?:role|from|content|value)"\s*:\s*".*\}\s*\]\s*\Z', re.DOTALL)
TRANSCRIPT = re.compile(r"(?:^|\n\n)(Human|Assistant): ?")


def transcript(text: str) -> list[Message]:
    """Turns of a `Human:`/`Assistant:` transcript as hh-rlhf has them; empty when the text is none."""
    if not re.match(r"\s*(?:Human|Assistant):", text) or "Human:" not in text:
        return []
    pieces = TRANSCRIPT.split("\n\n" + text.lstrip())
    roles = {"Human": "user", "Assistant": "assistant"}
    pairs = zip(pieces[1::2], pieces[2::2], strict=True)
    return [{"role": roles[name], "content": said.strip()} for name, said in pairs]


def _from_text(record: Record, key: str) -> dict[str, Any]:
    turns = transcript(_text(record, key))
    if not turns:
        raise BadRow("text must be a transcript of `Human:` and `Assistant:` turns; " + description("sft"))
    return {"messages": turns}


def _sharegpt(record: Record, key: str) -> dict[str, Any]:
    turns = record[key]
    for number, turn in enumerate(turns if isinstance(turns, list) else []):
        called = isinstance(turn, dict) and turn.get("from") == "function_call"
        if called and not record.get("tools"):
            raise BadRow(
                f"conversations[{number}] is a function_call, and the row has no `tools`: the model would learn to "
                "call what it is not told of; allowed: a list of tools, or its JSON text, beside conversations"
            )
    return _messages(record, key)


def _messages(record: Record, key: str) -> dict[str, Any]:
    return {"messages": read_messages(record[key], key), **_answer(record)}


def _prompt(record: Record, key: str) -> dict[str, Any]:
    return {"messages": _turns(record[key], key), **_answer(record)}


def _pair(record: Record, prompt: str, response: str) -> dict[str, Any]:
    return {"messages": [*_turns(record[prompt], prompt), *_reply(record[response], response)], **_answer(record)}


def _instruction(record: Record, key: str, *others: str) -> dict[str, Any]:
    """Of `others` the last is the response; what the instruction is about is `input` or, in Dolly's form, `context`."""
    asked = _asked(record, key, "context" if others == ("response",) else "input")
    return {"messages": [*asked, *_reply(record[others[-1]], others[-1])]}


def _asked(record: Record, key: str, about: str) -> list[Message]:
    parts = [_text(record, key), _text(record, about, "")]
    return [{"role": "user", "content": "\n\n".join(part for part in parts if part)}]


def _calling(record: Record, key: str, tools: str, answers: str) -> dict[str, Any]:
    """A question that is answered by calls of the row's `tools`, in JSON text (xLAM)."""
    return {"messages": [*_turns(record[key], key), read_message({"role": CALL, "content": record[answers]}, answers)]}


def _answer(record: Record) -> dict[str, Any]:
    """The expected answer: `answer`, verl's ground truth, or the last box of a MATH `solution`."""
    found: dict[str, Any] = {}
    if "reward_model" in record:
        stated, more = (read_object(record, key) for key in ("reward_model", "extra_info"))
        truth = stated.get("ground_truth")
        if truth is None:
            raise BadRow(f"reward_model.ground_truth must be there, found {kind(record['reward_model'])}")
        # A verifier's specification: as text, which a reward of one's own reads again.
        found["answer"] = json.dumps(truth, ensure_ascii=False) if isinstance(truth, dict | list) else _number(truth)
        extra = {key: record[key] for key in ("data_source", "ability") if key in record}
        found["metadata"] = {**extra, **more}
    if "answer" in record:
        answer = _number(record["answer"])
        if "answer" in found and found["answer"] != answer:
            raise BadRow(f"answer {answer!r} and reward_model.ground_truth {found['answer']!r} differ")
        found["answer"] = answer.rpartition("####")[2].strip() if "\n####" in answer else answer
    elif "answer" not in found and isinstance(record.get("solution"), str):
        from megatron_posttrain.rewards.math import boxed

        box = boxed(record["solution"])
        if box is not None:
            found["answer"] = box
    return found


def _number(answer: Any) -> str:
    if isinstance(answer, str):
        return answer
    if isinstance(answer, int | float) and not isinstance(answer, bool) and math.isfinite(answer):
        return str(int(answer)) if isinstance(answer, float) and answer.is_integer() else str(answer)
    raise BadRow(f"answer must be a string or a number, found {kind(answer)}")


def _comparison(record: Record, *keys: str) -> dict[str, Any]:
    """Two answers to one prompt; without a prompt, two conversations with a common beginning."""
    *prompts, one, two = keys
    if prompts == ["instruction"]:
        prompt = _asked(record, "instruction", "input")
    else:
        prompt = [turn for key in prompts for turn in _turns(record[key], key)]
    values = {name: record[name] for name in (one, two)}
    chosen, rejected = ((transcript(x) if isinstance(x, str) else []) or _reply(x, name) for name, x in values.items())
    if two == "rejected_response":
        rejected = [*chosen[:-1], *rejected]  # instead of the conversation's last turn
    # The answers may repeat the prompt (UltraFeedback); what both begin with belongs to the prompt.
    if prompt and chosen[: len(prompt)] == prompt and rejected[: len(prompt)] == prompt:
        prompt = []
    pairs = zip(chosen, rejected, strict=False)
    common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    if common == len(chosen) or common == len(rejected):
        # One side ends where the other goes on, or they are the same: the last turn is the answer.
        common = max(common - 1, 0)
    prompt, chosen, rejected = [*prompt, *chosen[:common]], chosen[common:], rejected[common:]
    if not prompt:
        raise BadRow(
            "chosen and rejected have no common beginning, and there is no prompt" + proposal(record, "preference")
        )
    for name, turns in ((one, chosen), (two, rejected)):
        if not turns or turns[0]["role"] != "assistant":
            raise BadRow(f"{name} must go on with an assistant's turn, found {kind(turns[:1])}")
    margin = record.get("margin")
    if margin is not None and (isinstance(margin, bool) or not isinstance(margin, int | float)):
        raise BadRow(f"margin must be a number, found {kind(margin)}")
    return {"messages": prompt, "chosen": chosen, "rejected": rejected, "margin": margin}


def _labelled(record: Record, key: str, *others: str) -> dict[str, Any]:
    *responses, label = others
    messages = _turns(record[key], key) + [turn for name in responses for turn in _reply(record[name], name)]
    if messages[-1]["role"] != "assistant":
        raise BadRow(f"a labelled row must end with the assistant's turn, found {kind(messages[-1])}")
    return {"messages": messages, "label": _label(record[label])}


def _label(value: Any) -> bool | None:
    """A label of 1 or 0, true or false, also as the text that CSV makes of them; None for any other."""
    if isinstance(value, str):
        return {"true": True, "1": True, "false": False, "0": False}.get(value.lower())
    return bool(value) if value in (0, 1) else None


def _judged(record: Record, key: str, one: str, two: str, *scale: str) -> dict[str, Any]:
    """Two outputs of which `preference` says the better one: 1 or 2, and 0, 1.5 or nothing for a tie (AlpacaEval); or a
    `scale` from -3, the first one, to 3, the second (HelpSteer3)."""
    name = scale[0] if scale else "preference"
    low, middle, high = (-3, 0, 3) if scale else (1, 1.5, 2)
    better = record.get(name) or middle
    if isinstance(better, bool) or not isinstance(better, int | float) or not low <= better <= high:
        allowed = "-3 to 3" if scale else "1 or 2, or 0 for a tie"
        raise BadRow(f"{name} must be {allowed}, found {kind(better)}")
    if better == middle:
        raise LeftOut(f"{name} says that neither output is better")
    chosen, rejected = (_reply(record[name], name) for name in ((one, two) if better < middle else (two, one)))
    return {"messages": _turns(record[key], key), "chosen": chosen, "rejected": rejected}


# The first form whose keys are all there is the row's.
BESIDE = ("answer", "solution", "reward_model", "extra_info", "data_source", "ability")
FORMS: tuple[Form, ...] = (
    *(
        Form("comparison", "preference", (*prompt, "chosen", "rejected"), _comparison, ("margin",))
        for prompt in (("prompt",), ("messages",), ("conversations",), ("question",), ("query",))
    ),
    Form("comparison", "preference", ("instruction", "chosen", "rejected"), _comparison, ("margin", "input")),
    Form("comparison", "preference", ("input", "chosen", "rejected"), _comparison, ("margin",)),
    Form("comparison", "preference", ("chosen", "rejected"), _comparison, ("margin",)),
    Form("comparison", "preference", ("messages", "rejected_response"), _comparison, ("margin",)),
    Form("comparison", "preference", ("messages", "rejected_messages"), _comparison, ("margin",)),
    Form("judged outputs", "preference", ("context", "response1", "response2", "overall_preference"), _judged),
    Form("judged outputs", "preference", ("instruction", "output_1", "output_2"), _judged, ("preference",)),
    Form("labelled", "preference", ("prompt", "completion", "label"), _labelled),
    Form("labelled", "preference", ("prompt", "response", "label"), _labelled),
    Form("labelled", "preference", ("messages", "response", "label"), _labelled),
    Form("labelled", "preference", ("messages", "label"), _labelled),
    Form("messages", "sft", ("messages",), _messages, BESIDE),
    Form("ShareGPT", "sft", ("conversations",), _sharegpt, BESIDE),
    Form("prompt and response", "sft", ("prompt", "response"), _pair, BESIDE),
    Form("prompt and response", "sft", ("prompt", "completion"), _pair, BESIDE),
    Form("question and response", "sft", ("question", "response"), _pair, BESIDE),
    Form("question and response", "sft", ("query", "response"), _pair, BESIDE),
    Form("calls of tools", "sft", ("query", "tools", "answers"), _calling),
    Form("Alpaca", "sft", ("instruction", "output"), _instruction, ("input",)),
    Form("GPTeacher", "sft", ("instruction", "input", "response"), _instruction, ("input",)),
    Form("Dolly", "sft", ("instruction", "response"), _instruction, ("context",)),
    *(Form(key, "rl", (key,), _prompt, BESIDE) for key in ("prompt", "question", "problem")),
    Form("transcript", "sft", ("text",), _from_text),
)
# Read beside every form.
COMMON = (
    "system", "system_prompt", "history", "tools", "functions", "chat_template_kwargs", "metadata",
)  # fmt: skip
# Without a meaning for what is trained.
MEANINGLESS = (
    "id", "ID", "_id", "idx", "index", "uid", "uuid", "key", "name", "task_id", "prompt_id", "question_id", "unique_id",
    "source", "url", "license", "dataset", "data_source", "category", "subject", "level", "type", "lang", "language",
    "model", "model_id", "created", "timestamp", "tstamp", "split",
)  # fmt: skip
KNOWN = frozenset((*COMMON, *MEANINGLESS))
# Parts of a question that no form reads: without them the question is another one.
QUESTION_PARTS = ("body", "Body", "context", "passage", "options", "choices", "input", "instruction", "question")

# Masks by token or by turn, and what is not text.
MASKS = ("loss_mask", "train_on_turn", "assistant_masks", "labels")
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
# Columns that say which of two outputs is better.
VERDICTS = ("preference", "winner", "better_response_id", "overall_preference")


def find_form(record: Record, use: str) -> Form | None:
    for form in FORMS:
        if all(key in record for key in form.keys):
            if form.name == "labelled" and _label(record["label"]) is None:
                continue
            if form.name == "question and response" and not isinstance(record["response"], str):  # several samples
                continue
            if use == "other" and _answered(record, form):
                continue
            if form.name == "transcript" and not transcript(str(record["text"])):
                continue
            return form
    return None


def _answered(record: Record, form: Form) -> bool:
    """Whether a row gives a conversation with its answer, and beside it the prompt alone, which is what is asked for
    (NuminaMath's `problem` and `messages`)."""
    if form.use != "sft" or not any(key in record for key in ("prompt", "question", "problem")):
        return False
    turns = record.get(form.keys[0])
    last = turns[-1] if isinstance(turns, list) and turns else None
    said = isinstance(last, dict) and ROLES.get(str(last.get("role", last.get("from")))) == "assistant"
    return said or form.keys == ("question", "response")


def refuse_unread(record: Record, form: Form, columns: Columns) -> None:
    """Refuse a row with what changes its meaning and its form would leave out: a question's part, a mask, pictures."""
    _unread_question(record, form)
    for key in ("weight", "train", "loss_weight"):
        if key in record and record[key] not in (1, True):
            raise BadRow(f"{key} of a whole row must be 1 or left out, found {kind(record[key])}; leave the row out")
    for key in MASKS:
        if isinstance(record.get(key), list):
            raise BadRow(f"{key} would not be read; allowed: `weight` 0 or 1 of each message")
    for key in MEDIA:
        if record.get(key):
            raise BadRow(f"{key}: only text is trained on, found {kind(record[key])}; leave the row out")
    verdict = next((key for key in VERDICTS if key in record), None)
    if verdict and "chosen" in columns:
        raise BadRow(
            f"data.columns.chosen is the same output in every row, and {verdict} says row by row which is better; "
            "read {instruction, output_1, output_2, preference} as they are, or write chosen and rejected"
        )


def _unread_question(record: Record, form: Form) -> None:
    if form.use == "rl" and isinstance(record[form.keys[0]], str):
        parts = [key for key in QUESTION_PARTS if record.get(key) and key not in form.reads]
        parts = [key for key in parts if record[key] != record[form.keys[0]]]
        if parts:
            parts = sorted([*parts, form.keys[0]], key=lambda key: key in ("options", "choices"))  # they come last
            joined = ", ".join(parts)
            unread = ", ".join(key for key in parts if key != form.keys[0])
            answer = "answer" if "answer" in record else "..."
            raise BadRow(
                f"{unread} beside {form.keys[0]} would not be read; join them with data.columns: "
                f"{{prompt: [{joined}], answer: {answer}}}"
            )
