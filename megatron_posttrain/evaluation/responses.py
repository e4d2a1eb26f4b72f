"""Graded responses to prompts, in a file that grows: `evaluate` sums them up, `sample` makes rows of them."""

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch.distributed as dist
from pydantic_core import from_json

from megatron_posttrain.data.dataset import Prompt
from megatron_posttrain.data.rows import Row
from megatron_posttrain.errors import UserError
from megatron_posttrain.output import write_whole
from megatron_posttrain.parallel.groups import broadcast_object
from megatron_posttrain.rewards import Reward
from megatron_posttrain.rollout import RolloutEngine, Sampling
from megatron_posttrain.rollout.samples import Samples, generate_samples
from megatron_posttrain.rollout.turns import ONE_TURN, Turns

Record = dict[str, Any]
RESPONSES, SETTINGS = "responses.jsonl", "sample.json"


@dataclass(frozen=True)
class Task:
    """A set of prompts, what grades their responses, and how these are sampled; or texts whose perplexity is asked."""

    prompts: Sequence[Prompt]
    rewards: Sequence[Reward]
    sampling: Sampling
    seed: int = 0
    save_every: int = 256  # prompts
    turns: Turns = ONE_TURN
    rows: Sequence[Row] = ()
    texts: Sequence[str] = ()
    name: str = "evaluation"
    about: Record = field(default_factory=dict)  # what its results tell of it
    settings: Record = field(default_factory=dict)  # all that its responses depend on


def respond(engine: RolloutEngine, tokenizer: Any, task: Task, output: Path) -> tuple[float, int]:
    """Collective: OUTPUT/responses.jsonl with `sampling.n` graded responses to each prompt, in their order.

    It grows by those to `save_every` prompts at a time. A run that was killed goes on after the last whole part, with
    the same prompts in each part and the same seed for each response: the file is that of a run that was not.

    Returns seconds of generation and tokens that were drawn, now. Raises UserError where a reward fails on a sample,
    ValueError where a prompt with `max_tokens` exceeds the engine's `max_model_len`.
    """
    file, n, every, seconds, tokens = output / RESPONSES, task.sampling.n, task.save_every, 0.0, 0
    there = _whole_parts(file, every * n, len(task.prompts) * n) if dist.get_rank() == 0 else 0
    for first in range(int(str(broadcast_object(there))) * every, len(task.prompts), every):
        part = task.prompts[first : first + every]
        seeds = range(task.seed + first * n, task.seed + (first + len(part)) * n)
        samples = generate_samples(engine, tokenizer, part, task.rewards, task.sampling, seeds, task.turns)
        seconds, tokens = seconds + samples.seconds, tokens + int(samples.sampled.sum())
        lines = list(samples.to_first_rank(_records(samples, n)))
        if dist.get_rank() == 0:
            with file.open("ab") as stream:
                stream.writelines(lines)
                stream.flush()
                os.fsync(stream.fileno())
            if len(task.prompts) > every:
                print(f"{first + len(part):,} of {len(task.prompts):,} prompts", flush=True)
    return seconds, tokens


def _records(samples: Samples, n: int) -> list[Record]:
    """Of this replica's responses. Raises UserError where a reward fails on one of anybody's."""
    for name, values in samples.rewards_by_name.items():
        if failed := sum(map(math.isnan, values.tolist())):
            raise UserError(f"reward {name!r} failed on {failed} of {len(values)} samples; a warning above says why")
    found = []
    for k, text, messages in zip(samples.drawn, samples.texts, samples.messages, strict=False):
        prompt = samples.prompts[k]
        record = {
            "index": prompt.index, "sample": k % n, "messages": prompt.messages, "answer": prompt.answer,
            "response": text, "reward": float(samples.rewards[k]),
            "rewards": {name: float(values[k]) for name, values in samples.rewards_by_name.items()},
            "tokens": int(samples.sampled[k]), "finish_reason": samples.finish_reason(k),
        }  # fmt: skip
        several = {"turns": messages} if len(messages) > 1 else {}  # else the response is the only one
        found.append(record | several | ({"metadata": prompt.metadata} if prompt.metadata else {}))
    return found


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


def other_settings(output: Path, settings: Record) -> str:
    """What of `settings` is another than in the directory; empty: all that lies there was made with these."""
    file = output / SETTINGS
    there = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    other = [key for key in settings if there.get(key) != settings[key]]
    return f"another {', '.join(other)}: {there.get(other[0])!r}, now {settings[other[0]]!r}" if other else ""


def begin(output: Path, settings: Record, *results: str) -> None:
    """Keeps what lies in a directory where `settings` made it; else its responses and `results` go."""
    if other_settings(output, settings):
        for name in (RESPONSES, *results):
            (output / name).unlink(missing_ok=True)
    write_whole(output / SETTINGS, json.dumps(settings, indent=2, ensure_ascii=False))


def by_prompt(records: Iterable[Record]) -> list[list[Record]]:
    """The responses to each prompt, which stand one after the other."""
    return [list(group) for _, group in groupby(records, lambda record: record["index"])]


def read_responses(output: Path) -> list[list[Record]]:
    """By prompt, of a directory."""
    with (output / RESPONSES).open("rb") as lines:
        return by_prompt(map(from_json, lines))
