"""N responses a prompt, kept in a file as they come; rows for `sft`, `dpo` and `grpo` from them."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch.distributed as dist
from pydantic_core import to_json

from megatron_posttrain.data.dataset import Prompt
from megatron_posttrain.data.rows import Row
from megatron_posttrain.errors import UserError
from megatron_posttrain.evaluation.evaluate import CORRECT, by_prompt, respond
from megatron_posttrain.parallel.groups import broadcast_object
from megatron_posttrain.rewards import Reward
from megatron_posttrain.rollout import RolloutEngine, Sampling

Record = dict[str, Any]
RESPONSES, SETTINGS = "responses.jsonl", "sample.json"


def sample(
    engine: RolloutEngine,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    rewards: Sequence[Reward],
    sampling: Sampling,
    seed: int,
    output: Path,
    save_every: int,
) -> None:
    """Collective: OUTPUT/responses.jsonl with `sampling.n` graded responses to each prompt, in their order.

    It grows by those to `save_every` prompts at a time. A run that was killed goes on after the last whole part, with
    the same prompts in each part and the same seed for each response: the file is that of a run that was not.
    """
    file, n = output / RESPONSES, sampling.n
    there = _whole_parts(file, save_every * n, len(prompts) * n) if dist.get_rank() == 0 else 0
    done = int(str(broadcast_object(there)))
    for first in range(done * save_every, len(prompts), save_every):
        part = prompts[first : first + save_every]
        seeds = range(seed + first * n, seed + (first + len(part)) * n)
        _, records = respond(engine, tokenizer, part, rewards, sampling, seeds)
        if dist.get_rank() == 0:
            with file.open("ab") as lines:
                lines.write(b"".join(to_json(record) + b"\n" for record in records))
                lines.flush()
                os.fsync(lines.fileno())
            print(f"{first + len(part):,} of {len(prompts):,} prompts", flush=True)


def _whole_parts(file: Path, size: int, total: int) -> int:
    """Parts of `size` lines in a file of `total` at the end; it is cut after them: half a part may be there."""
    ends = [0]
    with file.open("ab+") as lines:
        lines.seek(0)
        ends += [lines.tell() for line in iter(lines.readline, b"") if line.endswith(b"\n")]
        count = len(ends) - 1
        if count != total:
            count -= count % size
        lines.truncate(ends[count])
    return -(-count // size)


def check_settings(output: Path, settings: Record) -> None:
    """Raises UserError where responses lie in a directory that other settings made."""
    if (output / SETTINGS).exists() and (output / RESPONSES).exists():
        there = json.loads((output / SETTINGS).read_text(encoding="utf-8"))
        if other := [key for key in settings if there.get(key) != settings[key]]:
            raise UserError(
                f"--output {output}: the responses in it were sampled with another {', '.join(other)}: "
                f"{there.get(other[0])!r}, now {settings[other[0]]!r}; choose another directory, or remove this one"
            )


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
    with (output / RESPONSES).open("rb") as lines:
        groups = by_prompt(map(json.loads, lines))
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
