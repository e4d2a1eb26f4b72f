"""Rows: JSONL files or `datasets` sources, in the public row forms, as messages."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_posttrain.errors import UserError

Message = dict[str, Any]

FORMS = (
    "allowed: {messages: [{role, content}...]}, {prompt, response}, {instruction, input, output} (Alpaca), "
    "{instruction, context, response} (Dolly), {conversations: [{from, value}...]} (ShareGPT); for "
    "reinforcement learning {messages or prompt, answer, metadata}"
)
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}


@dataclass(frozen=True)
class Row:
    """One conversation, or one prompt of reinforcement learning."""

    messages: list[Message]
    answer: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    source: str = ""  # "file:line", for messages about this row


class _BadRow(Exception):
    """What is wrong with a row; `read_rows` adds where."""


def read_rows(sources: str | Path | Iterable[str | Path], *, require_assistant: bool = False) -> list[Row]:
    """Read every row of one or more sources, in order.

    Args:
        sources: JSONL files, other files or directories that `datasets` reads (Parquet, CSV, `save_to_disk`),
            or names of datasets (split `train`). `datasets` is imported only when it is needed.
        require_assistant: refuse rows without an assistant turn (SFT, scoring).

    Raises:
        UserError: a missing file, a malformed line, an unknown row form, a wrong type, an empty source;
            with the file and the line's number.
    """
    rows: list[Row] = []
    for source in [sources] if isinstance(sources, str | Path) else sources:
        before = len(rows)
        for where, record in _records(str(source)):
            try:
                row = _row(record, where)
                roles = [message["role"] for message in row.messages]
                if require_assistant and "assistant" not in roles:
                    raise _BadRow(f"no assistant turn; roles found: {roles}")
            except _BadRow as error:
                raise UserError(f"{where}: {error}") from None
            rows.append(row)
        if len(rows) == before:
            raise UserError(f"{source}: no rows in it")
    return rows


# ---- where rows come from --------------------------------------------------------------------------------


def _records(source: str) -> Iterator[tuple[str, Any]]:
    path = Path(source)
    if path.is_file() and path.suffix not in (".parquet", ".csv", ".arrow"):
        return _jsonl(path)
    if not path.exists() and (path.suffix in (".jsonl", ".json", ".parquet", ".csv") or source.startswith((".", "/"))):
        raise UserError(f"{source}: no such file")
    return _dataset(source)


def _jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                yield where, json.loads(line)
            except UnicodeDecodeError as error:
                raise UserError(f"{where}: not UTF-8: {error.reason} at byte {error.start}") from None
            except json.JSONDecodeError as error:
                raise UserError(f"{where}: malformed JSON: {error.msg} at column {error.colno}") from None


def _dataset(source: str) -> Iterator[tuple[str, Any]]:
    import datasets

    path = Path(source)
    try:
        if path.is_file():
            loaded = datasets.load_dataset(
                "arrow" if path.suffix == ".arrow" else path.suffix[1:], data_files=source, split="train"
            )
        elif (path / "state.json").exists():
            loaded = datasets.load_from_disk(source)
        else:
            loaded = datasets.load_dataset(source, split="train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"{source}: no such file, and `datasets` cannot load it: {error}") from error
    for number, record in enumerate(loaded, start=1):
        # Columns of a table are there in every row; a null one is one that this row does not have.
        yield f"{source}:{number}", {name: value for name, value in record.items() if value is not None}


# ---- what a row may look like ----------------------------------------------------------------------------


def _row(record: Any, where: str) -> Row:
    if not isinstance(record, dict):
        raise _BadRow(f"a row must be a JSON object, found {_kind(record)}; {FORMS}")
    for keys, form in FORM_READERS:
        if all(key in record for key in keys):
            messages = form(record)
            break
    else:
        raise _BadRow(f"unknown row form with the keys {sorted(record)}; {FORMS}")
    if not messages:
        raise _BadRow("a conversation without messages")
    return Row(messages, _answer(record), _typed(record, "metadata", dict, {}), where)


def _messages(record: dict[str, Any], key: str = "messages") -> list[Message]:
    messages = []
    for number, message in enumerate(_typed(record, key, list)):
        at = f"{key}[{number}]"
        if not isinstance(message, dict):
            raise _BadRow(f"{at} must be {{role, content}}, found {_kind(message)}")
        message = {name: value for name, value in message.items() if value is not None}
        if message.get("tool_calls"):
            message.setdefault("content", "")
        for name in ("role", "content"):
            if not isinstance(message.get(name), str):
                raise _BadRow(f"{at}.{name} must be a string, found {_kind(message.get(name))}")
        messages.append(message)
    return messages


def _from_sharegpt(record: dict[str, Any]) -> list[Message]:
    messages = []
    for number, turn in enumerate(_typed(record, "conversations", list)):
        at = f"conversations[{number}]"
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise _BadRow(f"{at} must be {{from, value}} of strings, found {_kind(turn)}")
        role = SHAREGPT_ROLES.get(str(turn.get("from")))
        if role is None:
            raise _BadRow(f"{at}.from is {turn.get('from')!r}; allowed: {', '.join(SHAREGPT_ROLES)}")
        messages.append({"role": role, "content": turn["value"]})
    return messages


def _from_prompt(record: dict[str, Any]) -> list[Message]:
    if isinstance(record["prompt"], list):
        return _messages(record, "prompt")
    return [{"role": "user", "content": _typed(record, "prompt", str)}]


def _from_prompt_response(record: dict[str, Any]) -> list[Message]:
    return [*_from_prompt(record), {"role": "assistant", "content": _typed(record, "response", str)}]


def _from_instruction(context: str, response: str) -> Callable[[dict[str, Any]], list[Message]]:
    def read(record: dict[str, Any]) -> list[Message]:
        parts = [_typed(record, "instruction", str), _typed(record, context, str, "")]
        return [
            {"role": "user", "content": "\n\n".join(part for part in parts if part)},
            {"role": "assistant", "content": _typed(record, response, str)},
        ]

    return read


# The first form whose keys are all there is the row's.
FORM_READERS: tuple[tuple[tuple[str, ...], Callable[[dict[str, Any]], list[Message]]], ...] = (
    (("messages",), _messages),
    (("conversations",), _from_sharegpt),
    (("prompt", "response"), _from_prompt_response),
    (("instruction", "output"), _from_instruction("input", "output")),
    (("instruction", "response"), _from_instruction("context", "response")),
    (("prompt",), _from_prompt),
)


def _answer(record: dict[str, Any]) -> str | None:
    answer = record.get("answer")
    if answer is None or isinstance(answer, str):
        return answer
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        return str(answer)
    raise _BadRow(f"answer must be a string or a number, found {_kind(answer)}")


def _typed(record: dict[str, Any], key: str, kind: type, default: Any = None) -> Any:
    value = record.get(key)
    if value is None:
        value = default
    if not isinstance(value, kind):
        raise _BadRow(f"{key} must be {_NAMES[kind]}, found {_kind(value)}")
    return value


_NAMES: dict[type, str] = {str: "a string", list: "a list", dict: "an object"}


def _kind(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return "nothing" if value is None else text if len(text) <= 80 else text[:77] + "..."
