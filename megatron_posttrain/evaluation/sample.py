"""Rows for `sft`, `dpo` and `grpo` from N graded responses a prompt."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean

from pydantic_core import to_json

from megatron_posttrain.data.rows import Row
from megatron_posttrain.evaluation.evaluate import CORRECT
from megatron_posttrain.evaluation.responses import Record, read_responses


def _shortest_correct(responses: list[Record]) -> list[Record]:
    return sorted(_correct(responses), key=lambda r: int(r["tokens"]))[:1]


def _correct(responses: list[Record]) -> list[Record]:
    return [r for r in responses if r["reward"] > CORRECT]


# Which of a prompt's responses become rows of `sft`; those that were cut off never do.
KEEP: dict[str, Callable[[list[Record]], list[Record]]] = {
    "correct": _correct,
    "shortest-correct": _shortest_correct,
    "best": lambda responses: sorted(responses, key=lambda r: (-r["reward"], r["tokens"]))[:1],
    "all": lambda responses: responses,
}


def write_rows(output: Path, rows: Sequence[Row], keep: str, mixed_only: bool) -> Record:
    """OUTPUT/sft.jsonl, dpo.jsonl and grpo.jsonl from its responses; returns how many, and the prompts' difficulty.

    Args:
        keep: of `KEEP`.
        mixed_only: no rows of `sft` for prompts whose responses are all correct; those that have none
            correct have nothing to learn from with any rule of `correct`.
    """
    counts = dict.fromkeys(("prompts", "all_correct", "none_correct", "sft", "dpo", "grpo"), 0)
    groups = read_responses(output)
    shares = [fmean(r["reward"] > CORRECT for r in group) for group in groups]
    files = {name: (output / f"{name}.jsonl").open("wb") for name in ("sft", "dpo", "grpo")}
    for group, share in zip(groups, shares, strict=True):
        row = rows[group[0]["index"]]
        counts["prompts"] += 1
        counts["all_correct"] += share == 1
        counts["none_correct"] += share == 0
        for name, made in _rows(row, group, share, keep, mixed_only):
            counts[name] += 1
            files[name].write(to_json({key: value for key, value in made.items() if value}) + b"\n")
    for file in files.values():
        file.close()
    return counts | {"correct": fmean(shares)}


def _rows(row: Row, group: list[Record], share: float, keep: str, mixed_only: bool) -> Iterator[tuple[str, Record]]:
    """Rows by what they are for; empty values are left out of them."""
    asked: Record = {"tools": row.tools, "chat_template_kwargs": row.template_options, "messages": row.messages}
    whole = [r for r in group if r["finish_reason"] != "length"]
    mixed = 0 < share < 1
    for response in KEEP[keep](whole) if mixed or not mixed_only else []:
        said = {"role": "assistant", "content": response["response"]}
        yield "sft", asked | {"messages": [*row.messages, said]}
    if whole:
        best = KEEP["best"](whole)[0]
        worst = min(group, key=lambda r: (r["reward"], -r["tokens"]))
        if best["reward"] > worst["reward"]:
            yield "dpo", asked | {"chosen": best["response"], "rejected": worst["response"]}
    if mixed:
        yield "grpo", asked | {"answer": row.answer, "metadata": {**row.metadata, "difficulty": 1 - share}}
