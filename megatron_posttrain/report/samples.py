"""The samples of a run's rollouts, or of an evaluation, as columns; texts of as many as fit."""

import base64
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from megatron_posttrain.report.collect import json_lines

TEXT_BYTES = 48 << 20  # of a run, before compression: browsers hold that with ease
RESPONSES = "responses.jsonl"
LEVELS = 100  # a nat, of a token's figures: they are kept as whole numbers of 16 bits
# Per-token lists that a record may have beside `token_ids`.
PER_TOKEN = ("logprobs", "logprob_differences", "entropies", "advantages")


def read(directory: Path) -> dict[str, Any] | None:
    """Columns over all samples, and `texts` of some; None where the directory has no samples.

    Whole prompts are kept, the first of every step as they come, which the data order has drawn at random, until the
    step's share of TEXT_BYTES is used.
    """
    files = sorted((directory / "rollouts").glob("step_*.jsonl")) or [*directory.glob(RESPONSES)]
    if not files:
        return None
    table = _Table(TEXT_BYTES // len(files), directory)
    for file in files:
        table.left = table.share
        for record in json_lines(file):
            table.add(int(file.stem.removeprefix("step_")) if file.name != RESPONSES else 0, record)
    return table.plain()


class _Table:
    def __init__(self, share: int, directory: Path) -> None:
        self.share = self.left = share
        self.directory = directory
        self.count = 0
        self.columns: dict[str, list[float]] = defaultdict(lambda: [math.nan] * self.count)
        self.prompts: dict[str, int] = {}  # text -> its number
        self.answers: list[str] = []
        self.texts: list[dict[str, Any]] = []
        self.token_ids: set[int] = set()
        self._prompt = (-1, -1)  # step and row of the last record's
        self._kept = False

    def add(self, step: int, record: dict[str, Any]) -> None:
        rewards = record.get("rewards") or {}
        length = len(record["token_ids"]) if "token_ids" in record else record.get("tokens", 0)
        figures = {
            "step": step,
            "row": record["index"],
            "reward": record.get("reward"),  # none of what `distill` samples
            "length": length,
            "truncated": record.get("finish_reason") == "length",
        } | {name: record[name] for name in ("advantage", "logprob_difference") if name in record}
        figures |= {f"reward/{name}": value for name, value in rewards.items() if len(rewards) > 1}
        for name, value in figures.items():
            self.columns[name].append(math.nan if value is None else float(value))
        self.count += 1
        for column in self.columns.values():
            column += [math.nan] * (self.count - len(column))
        self._keep_text((step, record["index"]), record)

    def _keep_text(self, prompt: tuple[int, int], record: dict[str, Any]) -> None:
        if prompt != self._prompt:
            self._prompt, self._kept = prompt, self.left > 0
        if not self._kept:
            return
        messages = record.get("prompt") or record.get("messages") or []
        asked = "\n".join(f"{message['role']}: {_text(message.get('content'))}" for message in messages)
        if asked not in self.prompts:
            self.prompts[asked] = len(self.prompts)
            self.answers.append("" if record.get("answer") is None else str(record["answer"]))
            self.left -= len(asked)
        text: dict[str, Any] = {"k": self.count - 1, "p": self.prompts[asked], "r": record["response"]}
        ids = record.get("token_ids") or []
        lists = {name: record[name] for name in PER_TOKEN if len(record.get(name) or []) == len(ids) > 0}
        if lists:
            self.token_ids.update(ids)
            text["t"] = packed(ids, "<i4")
            text |= {name: packed(np.clip(np.array(v) * LEVELS, -32768, 32767), "<i2") for name, v in lists.items()}
        self.left -= len(record["response"]) + 8 * len(ids) * len(lists)
        self.texts.append(text)

    def plain(self) -> dict[str, Any]:
        return {
            "count": self.count,
            "columns": {name: packed(values, "<f4") for name, values in self.columns.items()},
            "prompts": list(self.prompts),
            "answers": self.answers,
            "texts": self.texts,
            "pieces": self._pieces(),
            "levels": LEVELS,
        }

    def _pieces(self) -> dict[int, str]:
        """The text of every token that is shown, where the run has its tokenizer."""
        file = self.directory / "hf" / "tokenizer.json"
        if not self.token_ids or not file.is_file():
            return {}
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(file))
        return {i: tokenizer.decode([i], skip_special_tokens=False) for i in sorted(self.token_ids)}


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content if isinstance(part, dict))
    return content or ""


def packed(values: Any, kind: str) -> str:
    """Numbers as base64 of their bytes: `<f4`, `<i4` or `<i2`."""
    return base64.b64encode(np.asarray(values).astype(kind).tobytes()).decode()
