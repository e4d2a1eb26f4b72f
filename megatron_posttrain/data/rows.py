"""Rows of data files in the public forms, as messages. A form is a `Form` of `FORMS` in forms.py."""

import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_posttrain.data.columns import Columns, proposal, rename
from megatron_posttrain.data.files import records
from megatron_posttrain.data.forms import KNOWN, Form, description, find_form, refuse_unread
from megatron_posttrain.data.messages import BadRow, LeftOut, Message, kind, read_messages, read_object, read_tools
from megatron_posttrain.errors import UserError

__all__ = ["Message", "Reader", "Row", "read_records", "read_rows"]
log = logging.getLogger(__name__)
FIXED_OPTIONS = ("messages", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize")


@dataclass(frozen=True)
class Row:
    """One conversation, one prompt of reinforcement learning, or one comparison of answers."""

    messages: list[Message]
    answer: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    source: str = ""  # "file:line", for messages about this row
    tools: list[Any] = field(default_factory=list)
    template_options: dict[str, Any] = field(default_factory=dict)  # `chat_template_kwargs`
    form: Form | None = None
    chosen: list[Message] = field(default_factory=list)  # preference rows: what follows `messages`
    rejected: list[Message] = field(default_factory=list)
    margin: float | None = None
    label: bool | None = None  # KTO: whether the last turn is a good answer

    @property
    def options(self) -> dict[str, Any]:
        """What the chat template gets beside the messages."""
        return {**self.template_options, **({"tools": self.tools} if self.tools else {})}


def read_rows(
    sources: str | Path | Iterable[str | Path],
    *,
    require_assistant: bool = False,
    columns: Columns | None = None,
    use: str | None = None,
) -> list[Row]:
    """Read every row of one or more sources, in order.

    Args:
        sources: JSON lines, JSON arrays or CSV, also compressed (.gz, .zst); Parquet, directories of
            `save_to_disk`, names of datasets (split `train`), for which `datasets` is imported.
        require_assistant: refuse rows without an assistant turn (SFT, scoring).
        columns: our column names to the file's (`{"prompt": "question.stem"}`, a list joins several).
        use: `preference` reads rows of two or of labelled answers, which are refused otherwise.

    Raises UserError: a missing file, a malformed line, an unknown row form, a wrong type, an empty source; with the
    file and the line's number.
    """
    rows: list[Row] = []
    reader = Reader(columns or {}, use or ("sft" if require_assistant else "other"))
    for source in [sources] if isinstance(sources, str | Path) else sources:
        before = len(rows)
        rows += (row for row, _ in read_records(str(source), reader))
        if len(rows) == before:
            raise UserError(f"{source}: no rows in it")
    tell_ignored(reader.ignored)
    return rows


@dataclass
class Reader:
    """Records to rows, with counts of the columns and the rows that it leaves out.

    Args:
        use: rows of another are refused; `sft` (which needs an assistant's turn), `text` (as sft, without),
            `preference`, `other`, or `any`, which refuses none.
    """

    columns: Columns
    use: str
    ignored: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)

    def read(self, where: str, record: Any) -> Row | None:
        """None for a row that has nothing to train on. Raises UserError with `where`."""
        found = self.read_both(where, record)
        return None if found is None else found[0]

    def read_both(self, where: str, record: Any) -> tuple[Row, dict[str, Any]] | None:
        """As `read`, with the record, columns renamed."""
        try:
            row, record = _row(record, where, self.columns, self.use)
            if self.use != "any":
                _check_use(row, record, self.use)
        except BadRow as error:
            raise UserError(f"{where}: {error}") from None
        except LeftOut as reason:
            self.left_out[str(reason)] += 1
            return None
        read = row.form.reads if row.form else ()
        self.ignored.update(key for key in record if key not in KNOWN and key not in read)
        return row, record


def read_records(source: str, reader: Reader) -> Iterator[tuple[Row, dict[str, Any]]]:
    """Each row of a source, and the record it was read from, columns renamed."""
    reader.left_out.clear()
    for where, record in records(source):
        if (found := reader.read_both(where, record)) is not None:
            yield found
    tell_left_out(source, reader.left_out)


def tell(text: str) -> None:
    """A line of the log, of one rank."""
    if os.environ.get("RANK", "0") == "0":
        log.warning("data: %s", text)


def tell_left_out(source: str, reasons: Mapping[str, int]) -> None:
    for why, count in reasons.items():
        tell(f"{source}: {count:,} rows left out: {why}")


def tell_ignored(columns: Mapping[str, int]) -> None:
    if columns:
        counts = ", ".join(f"{key} ({n:,})" for key, n in sorted(columns.items(), key=lambda item: -item[1]))
        tell(f"columns that no form reads, with the rows that have them: {counts}")


def _row(record: Any, where: str, columns: Columns, use: str) -> tuple[Row, dict[str, Any]]:
    if not isinstance(record, dict):
        raise BadRow(f"a row must be a JSON object, found {kind(record)}; {description(use)}")
    # Columns of a table are there in every row; a null one is one that this row does not have.
    record = rename({name: value for name, value in record.items() if value is not None}, columns)
    form = find_form(record, use)
    if form is None:
        raise BadRow(f"unknown row form with the keys {sorted(record)}; {description(use)}{proposal(record, use)}")
    refuse_unread(record, form, columns)
    fields = form.read(record)
    messages: list[Message] = fields.pop("messages")
    if not messages:
        raise BadRow("a conversation without messages")
    options = read_object(record, "chat_template_kwargs")
    if fixed := [key for key in FIXED_OPTIONS if key in options]:
        raise BadRow(f"chat_template_kwargs.{fixed[0]}: {', '.join(FIXED_OPTIONS)} are not a row's to set")
    tools = read_tools(record.get("tools") or record.get("functions") or options.pop("tools", None))
    messages = _with_beginning(record, messages)
    metadata = read_object(record, "metadata") or fields.pop("metadata", {})
    row = Row(messages, metadata=metadata, source=where, tools=tools, template_options=options, form=form, **fields)
    return row, record


def _with_beginning(record: dict[str, Any], messages: list[Message]) -> list[Message]:
    """The row's `history` of (question, answer) pairs and its `system` text in front of its messages."""
    history = record.get("history") or []
    if not isinstance(history, list):
        raise BadRow(f"history must be a list of [question, answer], found {kind(history)}")
    if history and all(isinstance(turn, dict) for turn in history):
        messages = [*read_messages(history, "history"), *messages]
    else:
        before: list[Message] = []
        for number, pair in enumerate(history):
            if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
                raise BadRow(f"history[{number}] must be [question, answer], found {kind(pair)}")
            before += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
        messages = [*before, *messages]
    named = [key for key in ("system", "system_prompt") if record.get(key)]
    for key in named:
        if not isinstance(record[key], str):
            raise BadRow(f"{key} must be a string, found {kind(record[key])}")
        first = messages[0]
        if first["role"] != "system":
            messages = [{"role": "system", "content": record[key]}, *messages]
        elif first["content"] != record[key]:
            raise BadRow(f"{key} and the first message give two system texts: {kind(record[key])}, {kind(first)}")
    return messages


_SIDES = {(True, False): "rejected", (False, True): "chosen"}


def _check_use(row: Row, record: dict[str, Any], use: str) -> None:
    form = row.form
    weights = {turn.get("weight", 1) for turn in (*row.messages, *row.chosen, *row.rejected)} - {0, 1}
    if use not in ("sft", "text") and weights:
        raise BadRow(f"a turn of weight {min(weights)}: only sft and distill weigh turns; allowed here: 0 or 1")
    if use == "preference" and row.label is None and "label" in record:
        raise BadRow(f"label must be true or false, found {kind(record['label'])}")
    if use == "preference" and (missing := _SIDES.get(("chosen" in record, "rejected" in record))):
        raise BadRow(f"no {missing}; a pair has chosen and rejected, found the keys {sorted(record)}")
    if form is not None and (form.use == "preference") != (use == "preference"):
        wanted = "rows of preferences" if use == "preference" else "rows of conversations or prompts"
        raise BadRow(
            f"a row of the form {form.name} ({', '.join(form.keys)}), which is for {form.use}; here {wanted} are "
            f"read{proposal(record, use)}"
        )
    roles = [message["role"] for message in row.messages]
    if use == "sft" and "assistant" not in roles:
        raise BadRow(f"no assistant turn; roles found: {roles}, keys: {sorted(record)}{proposal(record, use)}")
