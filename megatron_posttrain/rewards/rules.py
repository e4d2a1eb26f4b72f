"""Rewards by rule: what an answer is, how near it is to a reference, how it is written, how long it is."""

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from megatron_posttrain.errors import UserError
from megatron_posttrain.rewards.extract import boxed
from megatron_posttrain.rewards.registry import GradingError, Sample, Score, reward
from megatron_posttrain.rewards.response import REASONING

_LETTER = r"\(?\*{0,2}([A-Z])\*{0,2}\)?"
_SAYS = re.compile(
    rf"(?:answer|choice|option)\b(?:\s+is)?\s*[:：]?\s*(?:option|choice)?\s*\*{{0,2}}{_LETTER}(?![\w'’])"
    rf"|答案\s*(?:是|为|：|:)?\s*{_LETTER}(?!\w)",
    re.IGNORECASE,
)
_FENCE = re.compile(r"```(?:json)?[ \t]*\n(.*?)```", re.DOTALL)


@reward("choice", needs_answer=True)
def choice(sample: Sample) -> float:
    """1.0 when the letter that the answer gives is the expected one: boxed, after `answer is`, or alone.

    The last statement counts; an answer that names no letter, or lists several options, gets 0.0.
    """
    expected = re.fullmatch(rf"{_LETTER}[.):]?(?:\s.*)?", (sample.answer or "").strip(), re.DOTALL)
    if expected is None:
        raise GradingError(f"the row's answer must be a letter, found {sample.answer!r:.80}")
    return float(chosen_letter(sample.final or "") == expected[1])


def chosen_letter(text: str) -> str | None:
    if (box := boxed(text)) is not None:
        inner = re.fullmatch(rf"(?:\\text\w*\s*\{{)?\s*{_LETTER}\s*\}}?(?:[.):].*)?", box.strip(), re.DOTALL)
        return inner[1] if inner else None
    said = None
    for match in _SAYS.finditer(text):
        letter = match[1] or match[2]
        said = letter if letter.isupper() else said
    if said:
        return said
    lines = [line for line in text.strip().splitlines() if line.strip()]
    begun = [re.match(rf"\s*{_LETTER}[.):]", line) for line in lines]
    options = [found[1] if found else None for found in begun]  # that a line begins with
    before = [option for option in options[:-1] if option]
    last = re.fullmatch(rf"\s*{_LETTER}\s*[.。]?\s*", lines[-1]) if lines else None
    if last and before:  # behind a list of options the one that is chosen, or the next of a list that is cut off
        return None if ord(last[1]) == ord(before[-1]) + 1 else last[1]
    if len({*options} - {None}) > 1:
        return None
    for line in [*lines[-1:], *lines[:1]]:
        if alone := re.fullmatch(rf"\s*{_LETTER}(?:[.):].*)?\s*[.。]?", line):
            return alone[1]
    return None


@reward("exact", needs_answer=True)
def exact(sample: Sample, *, ignore_case: bool = False) -> float:
    """1.0 when the answer is the expected text, white space at the ends and its amount left out."""
    given, expected = (" ".join((text or "").split()) for text in (sample.final, sample.answer))
    return float(given.casefold() == expected.casefold() if ignore_case else given == expected)


@reward("regex")
class Regex:
    """1.0 when a pattern is found in the answer; where the pattern has a group and the row an answer, when they agree.

    Args:
        pattern: a regular expression; `.` matches line ends too.
        whole: it must match all of the answer.
        of: the answer that follows the reasoning, or the whole response.
    """

    def __init__(self, *, pattern: str, whole: bool = False, of: Literal["answer", "response"] = "answer") -> None:
        try:
            self._pattern = re.compile(pattern, re.DOTALL)
        except re.error as error:
            raise UserError(f"rewards: 'regex': args.pattern: {pattern!r} is no regular expression: {error}") from None
        self._whole, self._of = whole, of

    def __call__(self, sample: Sample) -> float:
        text = sample.response if self._of == "response" else sample.final or ""
        match = self._pattern.fullmatch(text.strip()) if self._whole else self._pattern.search(text)
        if match is None:
            return 0.0
        if self._pattern.groups and sample.answer is not None:
            return float((match[1] or "").strip() == sample.answer.strip())
        return 1.0


@reward("json_schema")
class JsonSchema:
    """1.0 when the answer is JSON (alone, or in its last code block) that fits a schema: `schema`, the JSON Schema or
    its file, else the row's `metadata.schema`."""

    def __init__(self, *, schema: dict[str, Any] | str | None = None) -> None:
        where = "rewards: 'json_schema': args.schema"
        self._schema: Any = schema
        if isinstance(schema, str):
            path = Path(schema)
            if not path.is_file():
                raise UserError(f"{where}: {path} does not exist")
            try:
                self._schema = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise UserError(f"{where}: {path} is no JSON: {error}") from None
        if self._schema is not None:
            try:
                _validator(self._schema)
            except GradingError as error:
                raise UserError(f"{where}: {error}") from None

    def __call__(self, sample: Sample) -> float:
        schema = self._schema if self._schema is not None else sample.metadata.get("schema")
        if schema is None:
            raise GradingError("neither args.schema nor the row's metadata.schema is there")
        text = sample.final or ""
        blocks = _FENCE.findall(text)
        try:
            value = json.loads(blocks[-1] if blocks else text)
        except (ValueError, RecursionError):
            return 0.0
        return float(_validator(json.loads(schema) if isinstance(schema, str) else schema).is_valid(value))


def _validator(schema: Any) -> Any:
    import jsonschema

    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise GradingError(f"no valid JSON Schema: {error.message}") from None
    return kind(schema)


@reward("similarity", needs_answer=True)
class Similarity:
    """Likeness of the answer to the row's, from 0 to 1, by sacrebleu (bleu, chrf) or rouge-score (F1, with stemming).

    `evaluate` tells that of all answers together too, which is what is published: of BLEU and chrF it is no mean.
    """

    def __init__(self, *, metric: Literal["bleu", "chrf", "rouge1", "rouge2", "rougeL"] = "rougeL") -> None:
        self._metric = metric
        package = "rouge-score" if metric.startswith("rouge") else "sacrebleu"
        try:
            if package == "sacrebleu":
                import sacrebleu

                self._library: Any = sacrebleu
            else:
                from rouge_score.rouge_scorer import RougeScorer

                self._library = RougeScorer([metric], use_stemmer=True)
        except ImportError as error:
            raise UserError(
                f"rewards: 'similarity': args.metric {metric}: {error}; install it: pip install {package}"
            ) from None

    def __call__(self, sample: Sample) -> float:
        return self.corpus([sample.final or ""], [sample.answer or ""], f"sentence_{self._metric}")

    def corpus(self, answers: Sequence[str], references: Sequence[str], function: str | None = None) -> float:
        """Of all answers together."""
        if self._metric.startswith("rouge"):
            pairs = zip(references, answers, strict=True)
            return sum(float(self._library.score(*pair)[self._metric].fmeasure) for pair in pairs) / len(answers)
        if function:
            return float(getattr(self._library, function)(answers[0], references).score) / 100
        return float(getattr(self._library, f"corpus_{self._metric}")(answers, [references]).score) / 100


@reward("format")
def think_format(sample: Sample, *, opening: Literal["required", "optional"] = "optional") -> float:
    """1.0 for reasoning in one pair of its tags, then an answer that is not empty. Where `opening` is `optional` the
    opening tag may be missing, as where the prompt ends with it."""
    text = sample.response.strip()
    for begin, end in REASONING:
        if text.count(end) == 1 and text.count(begin) <= 1:
            reasoning, answer = text.split(end)
            opened = reasoning.startswith(begin)
            begun = opened or (opening == "optional" and begin not in reasoning)
            return float(begun and begin not in answer and bool(answer.strip()))
    return 0.0


def _length(sample: Sample) -> int:
    if sample.tokens is None:
        raise GradingError("the number of tokens of the response is not known here")
    return sample.tokens


@reward("overlong")
def overlong(sample: Sample, *, max_tokens: int, buffer: int = 4096) -> float:
    """Soft overlong punishment (DAPO, arXiv 2503.14476, equation 13): 0 to -1 over the last `buffer` of `max_tokens`
    tokens; longer and truncated responses get -1."""
    if sample.truncated:
        return -1.0
    return max(-1.0, min(0.0, (max_tokens - buffer - _length(sample)) / buffer))


@reward("length")
def length(sample: Sample, *, target: int, tolerance: int = 0, slope: float = 1.0) -> float:
    """1.0 within `tolerance` tokens of `target`, less by `slope` per `target` tokens outside, at least 0."""
    outside = max(0, abs(_length(sample) - target) - tolerance)
    return max(0.0, 1.0 - slope * outside / target)


@reward("shorter", per="group")
def shorter(samples: list[Sample]) -> list[float]:
    """Length reward of Kimi k1.5 (arXiv 2501.12599, section 2.3.3) for right answers: 0.5 for the shortest of a
    prompt's samples, -0.5 for the longest, in tokens. Whether an answer is right is another reward's to say.
    """
    lengths = [_length(sample) for sample in samples]
    low, high = min(lengths), max(lengths)
    return [0.0 if high == low else 0.5 - (n - low) / (high - low) for n in lengths]


@reward("repetition")
def repetition(sample: Sample, *, ngram: int = 3, penalty: float = -1.0) -> Score:
    """`penalty` times the share of n-grams of words that were there before (arXiv 2502.03373, appendix).

    Text without spaces is counted by characters.
    """
    words = re.findall(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|\w+", sample.response.lower())
    grams = list(zip(*(words[i:] for i in range(ngram)), strict=False))
    share = 1.0 - len(set(grams)) / len(grams) if grams else 0.0
    return Score(penalty * share, {"share": share})


@reward("environment")
def environment(sample: Sample) -> float:
    """What the `environment` of the conversation gave at its end; 0.0 where it did not come to one."""
    return sample.environment_reward


@reward("random", per="batch")
def coin(samples: list[Sample], *, probability: float = 0.5, seed: int = 0) -> list[float]:
    """1.0 with `probability`, else 0.0, whatever was said: the control run, which must not learn."""
    # By text and position: a resumed run draws the same, and no text has a reward of its own.
    draws = (random.Random(f"{seed} {i} {s.messages} {s.response}").random() for i, s in enumerate(samples))
    return [float(draw < probability) for draw in draws]
