"""Evaluation sets as YAML: which rows, how they are asked, what grades them, how responses are sampled."""

import random
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Self

from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import SandboxedEnvironment
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, PrivateAttr, model_validator

from megatron_posttrain.config.schema import ColumnNames, EnvironmentConfig, Fraction, RewardConfig, Section
from megatron_posttrain.data.columns import rename
from megatron_posttrain.data.files import records, whole_text
from megatron_posttrain.data.messages import BadRow
from megatron_posttrain.data.rows import Row, read_rows
from megatron_posttrain.errors import UserError
from megatron_posttrain.rollout import Sampling

# What Qwen3 was evaluated with (arXiv 2505.09388, section 4.6), and whether its template lets it think.
PRESETS: dict[str, tuple[dict[str, float], bool | None]] = {
    "greedy": ({"temperature": 0.0}, None),
    "qwen3-thinking": ({"temperature": 0.6, "top_p": 0.95, "top_k": 20}, True),
    "qwen3-non-thinking": ({"temperature": 0.7, "top_p": 0.8, "top_k": 20, "presence_penalty": 1.5}, False),
}


class FewShot(Section):
    data: str = Field(description="file whose first rows are answered before the question, as earlier turns")
    count: PositiveInt = 5
    response: str = Field(description="template of an answer, from the row's columns")


class Join(Section):
    data: str = Field(description="file of rows whose columns are added")
    key: str = Field(description="column of both files that says which rows belong together")


class EvaluationSet(Section):
    data: str = Field(description="file of rows")
    join: Join | None = Field(None, description="columns from a second file, such as of answers")
    columns: ColumnNames = Field(default_factory=dict, description="as data.columns")
    prompt: str | None = Field(
        None,
        description="Jinja template of the question, from a row's columns; filters: shuffled (a list, always the same "
        "way), letter (0 is A); text('FILE'): what stands in it; null: the rows are in a form that training reads",
    )
    answer: str | None = Field(None, description="template of the expected answer")
    metadata: dict[str, str] = Field(default_factory=dict, description="what rewards read: name to column")
    few_shot: FewShot | None = Field(None, description="answered questions before each")
    system: str | None = Field(None, description="a system turn before each question")
    rewards: list[RewardConfig] = Field(default_factory=lambda: [RewardConfig(name="math")], min_length=1)
    environment: EnvironmentConfig | None = Field(None, description="what answers the model's turns; null: one turn")
    limit: PositiveInt | None = Field(None, description="only the first rows")
    samples: PositiveInt = Field(1, description="responses a prompt")
    max_tokens: PositiveInt = Field(1024, description="of a response; of a window of perplexity")
    perplexity: str | None = Field(
        None, description="template of a text; its perplexity is measured, nothing asked. A .txt file is one text"
    )
    preset: Literal["greedy", "qwen3-thinking", "qwen3-non-thinking"] = Field(
        "greedy", description="temperature, top_p, top_k, presence_penalty and thinking, where they are not given"
    )
    temperature: NonNegativeFloat | None = Field(None, allow_inf_nan=False)
    top_p: Fraction | None = None
    top_k: NonNegativeInt | None = Field(None, description="0: all tokens")
    presence_penalty: float | None = None
    thinking: bool | None = Field(None, description="the template's enable_thinking; null: its default")

    _directory: Path = PrivateAttr(Path())

    @model_validator(mode="after")
    def _nothing_ignored(self) -> Self:
        told = sorted(self.model_fields_set - {"data", "perplexity", "max_tokens", "limit"})
        if self.perplexity is not None and told:
            raise ValueError(f"{', '.join(told)} would be ignored beside perplexity")
        return self

    @property
    def sampling(self) -> Sampling:
        named: dict[str, Any] = PRESETS[self.preset][0]
        given = {name: getattr(self, name) for name in ("temperature", "top_p", "top_k", "presence_penalty")}
        return Sampling(
            self.samples, self.max_tokens, **named | {name: value for name, value in given.items() if value is not None}
        )

    @property
    def graded_by(self) -> str:
        return "perplexity" if self.perplexity is not None else ", ".join(spec.name for spec in self.rewards)

    def rows(self, directory: Path = Path()) -> list[Row]:
        """The set's rows; file names start from `directory`. Raises UserError with file and line."""
        self._directory = directory
        before, file = self._asked_before(directory), str(directory / self.data)
        found = list(self._rendered(directory)) if self.prompt is not None else read_rows(file, columns=self.columns)
        thinking = self.thinking if self.thinking is not None else PRESETS[self.preset][1]
        options = {} if thinking is None else {"enable_thinking": thinking}
        return [
            replace(row, messages=[*before, *row.messages], template_options=row.template_options | options)
            for row in found[: self.limit]
        ]

    def texts(self, directory: Path = Path()) -> list[str]:
        """Of a set of perplexity."""
        file = directory / self.data
        if ".txt" in file.suffixes[-2:]:
            return [whole_text(file)]
        found = [self._fill("perplexity", row, where) for where, row in islice(records(str(file)), self.limit)]
        if not found:
            raise UserError(f"{file}: no rows in it")
        return found

    def _asked_before(self, directory: Path) -> list[dict[str, Any]]:
        turns: list[dict[str, Any]] = [{"role": "system", "content": self.system}] if self.system else []
        if self.few_shot is None:
            return turns
        shots = list(records(str(directory / self.few_shot.data)))
        if self.few_shot.data == self.data or len(shots) < self.few_shot.count:
            raise UserError(
                f"few_shot.data {self.few_shot.data}: {len(shots)} rows; allowed: another file than the set's, with "
                f"the {self.few_shot.count} rows of few_shot.count"
            )
        for where, record in shots[: self.few_shot.count]:
            question = self._fill("prompt", record, where)
            turns.append({"role": "user", "content": question})
            turns.append({"role": "assistant", "content": self._fill("few_shot.response", record, where)})
        return turns

    def _rendered(self, directory: Path) -> Iterator[Row]:
        more = {row[self.join.key]: row for _, row in records(str(directory / self.join.data))} if self.join else {}
        for where, record in records(str(directory / self.data)):
            if self.join:
                if (key := record.get(self.join.key)) not in more:
                    raise UserError(f"{where}: join.key: {self.join.data} has no row of {self.join.key} {key!r}")
                record = more[key] | record
            try:
                named = rename(record, self.columns)
                metadata = rename(record, self.metadata)
            except BadRow as error:
                raise UserError(f"{where}: {error}") from None
            answer = self._fill("answer", named, where) if self.answer is not None else None
            question = [{"role": "user", "content": self._fill("prompt", named, where)}]
            yield Row(question, answer, {key: metadata[key] for key in self.metadata}, where)

    @cached_property
    def _templates(self) -> Mapping[str, Any]:
        environment = SandboxedEnvironment(undefined=StrictUndefined)
        environment.filters |= {"shuffled": _shuffled, "letter": _letter}
        environment.globals["text"] = lambda name: whole_text(self._directory / name)
        shot = self.few_shot.response if self.few_shot else None
        texts = {"prompt": self.prompt, "answer": self.answer, "few_shot.response": shot, "perplexity": self.perplexity}
        try:
            return {name: environment.from_string(text) for name, text in texts.items() if text is not None}
        except TemplateError as error:
            raise UserError(f"a template of the set on {self.data}: {error}") from None

    def _fill(self, name: str, record: Mapping[str, Any], where: str) -> str:
        try:
            text = str(self._templates[name].render(record))
            return text if name == "perplexity" else text.strip()
        except KeyError:
            raise UserError("few_shot needs `prompt`, the template of its questions") from None
        except (TemplateError, ValueError, TypeError, IndexError) as error:
            raise UserError(f"{where}: {name}: {error}; columns found: {', '.join(record)}") from None


def _shuffled(values: list[Any]) -> list[Any]:
    """In an order that depends on the values alone."""
    return random.Random(repr(values)).sample(values, len(values))


def _letter(index: int) -> str:
    return chr(ord("A") + index)


class Suite(Section):
    sets: dict[str, EvaluationSet] = Field(min_length=1, description="name to set")
