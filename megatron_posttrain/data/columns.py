"""Columns of files under other names than ours: `data.columns`, and what it would be for the keys of a row."""

import json
from collections.abc import Mapping
from typing import Any

from megatron_posttrain.data.messages import BadRow

Record = dict[str, Any]
Columns = Mapping[str, str | list[str]]
CONVERSATIONS = ("messages", "conversations", "prompt", "chosen", "rejected", "history")  # our own names of some


def rename(record: Record, columns: Columns) -> Record:
    """The record under our names; a column that is renamed is no longer there under its own.

    A name may reach into a column (`question.stem`, `turns.0`); several are joined by an empty line.
    """
    found: Record = {}
    gone: set[str] = set()
    for ours, theirs in columns.items():
        names = [theirs] if isinstance(theirs, str) else theirs
        gone |= {*names, *(name.partition(".")[0] for name in names)}
        values = [_reach(record, name) for name in names]
        value = values[0] if len(values) == 1 else "\n\n".join(filter(None, map(_joined, values))) or None
        if value is None:
            raise BadRow(f"data.columns.{ours}: no column {' or '.join(names)}; found {sorted(record)}")
        found[ours] = value
    return {**{key: value for key, value in record.items() if key not in gone}, **found}


def _reach(record: Record, name: str) -> Any:
    if name in record:
        return record[name]
    value: Any = record
    for step in name.split("."):
        if isinstance(value, dict) and step in value:
            value = value[step]
        elif isinstance(value, list) and step.isdigit() and int(step) < len(value):
            value = value[int(step)]
        else:
            return None
    return value


def _joined(value: Any) -> str:
    if isinstance(value, list):
        return "\n".join(x if isinstance(x, str) else json.dumps(x, ensure_ascii=False) for x in value)
    return value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)


# Names that public files have for what we call by others; the likelier one first.
LIKELY = {
    "prompt": (
        "question", "Question", "query", "problem", "Problem", "instruction", "input.messages", "context_messages",
        "input", "inputs", "text", "quiz", "content", "prompt", "turns",
    ),
    "answer": (
        "answer", "Answer", "final_answer", "expected_answer", "target", "gt", "ground_truth", "correct",
        "solution_text", "answerKey", "label",
    ),
    "response": (
        "response", "output", "completion", "Best Answer", "code", "reply", "canonical_solution", "targets",
        "generated_solution", "solution", "Solution", "answer", "Answer", "chosen",
    ),
    "chosen": ("chosen", "chosen_messages", "chosen_response", "preferred_output", "preferred", "response_j"),
    "rejected": (
        "rejected", "rejected_messages", "rejected_response", "non_preferred_output", "dispreferred", "response_k",
    ),
}  # fmt: skip
PAIRS: list[tuple[str, ...]] = [("prompt", "chosen", "rejected"), ("chosen", "rejected")]
WANTED: dict[str, list[tuple[str, ...]]] = {
    "preference": PAIRS, "sft": [("prompt", "response")], "other": [("prompt", "answer"), ("prompt",)],
}  # fmt: skip


def proposal(record: Record, use: str) -> str:
    """The mapping that would make a known form of the keys of a row, for the `use` of a `Reader`; the end of a
    message."""
    for key, value in record.items() if use != "preference" else ():
        turn = value[0] if isinstance(value, list) and value else None
        ours = key in CONVERSATIONS and not (use == "sft" and key == "chosen")
        if isinstance(turn, dict) and not ours and ({"role", "content"} <= set(turn) or {"from", "value"} <= set(turn)):
            return f"; try data.columns: {{messages: {key}}}"
    found = {ours: next((key for key in keys if _reach(record, key) is not None), "") for ours, keys in LIKELY.items()}
    wanted = WANTED.get(use, [*PAIRS, *WANTED["sft"], *WANTED["other"]])
    for names in wanted:
        if all(found[name] for name in names) and any(found[name] != name for name in names):
            return "; try data.columns: {" + ", ".join(f"{name}: {found[name]}" for name in names) + "}"
    return "; data.columns: {" + ", ".join(f"{name}: THEIR_NAME" for name in wanted[0]) + "} renames columns"
