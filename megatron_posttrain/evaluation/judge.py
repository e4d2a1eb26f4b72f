"""Models' answers graded or compared by a judge: grades by turn, win rates, its biases, ratings of many models."""

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_posttrain.data.columns import rename
from megatron_posttrain.data.files import records
from megatron_posttrain.data.messages import BadRow
from megatron_posttrain.data.rows import Reader, read_records
from megatron_posttrain.errors import UserError
from megatron_posttrain.rewards import Reward, Sample, compute_rewards
from megatron_posttrain.rewards.response import split_reasoning

Record = dict[str, Any]
Array = NDArray[np.float64]
RIDGE = 0.01  # keeps the ratings of a model that wins always finite
RESAMPLES = 300


@dataclass(frozen=True)
class Verdict:
    """What the judge said of two models' answers to a prompt, asked in both orders."""

    first: str
    second: str
    prompt: str
    value: float  # 1: the first model's answer is better both times; 0.5: a tie, or contradictory verdicts
    contradiction: bool
    shown_first: float | None  # share of the two verdicts for the answer shown first; None: not asked, one is empty
    longer: int  # characters that the first model's answer is longer


@dataclass(frozen=True)
class Answer:
    text: str  # without its reasoning
    prompt: str = ""  # the messages before the conversation's first answer, as JSON
    turn: int = 1
    metadata: Mapping[str, Any] = field(default_factory=dict)


Answers = Mapping[str, Answer]  # by the messages before each, as JSON


def read_answers(file: str, every: bool = False) -> Answers:
    """The first answer to each prompt; of responses.jsonl, or of rows of conversations.

    Args:
        every: of all turns, each behind the model's own answers before it; else of the last turn.
    """
    first: Any = next(records(file), ("", {}))[1]
    generated = isinstance(first, dict) and {"messages", "response"} <= first.keys()
    found: dict[str, Answer] = {}
    for row, record in read_records(file, Reader({"prompt": "messages"} if generated else {}, "any")):
        *asked, said = row.messages
        if said["role"] != "assistant" or not asked:
            raise UserError(f"{row.source}: no answer; allowed: {{messages or prompt, response}}, or messages with one")
        turns = [said]
        if every and generated:
            turns = record.get("turns", turns)
        elif every:
            asked = asked[: [m["role"] for m in row.messages].index("assistant")]
            turns = row.messages[len(asked) :]
        prompt, before, turn = json.dumps(asked), list(asked), 0
        for message, following in zip(turns, [*turns[1:], {"role": "user"}], strict=True):
            if message["role"] == "assistant":
                message = message | {"content": split_reasoning(str(message["content"] or ""))[1]}
                if following["role"] == "user":  # else it called a tool
                    turn += 1
                    found.setdefault(json.dumps(before), Answer(message["content"], prompt, turn, row.metadata))
            before.append(message)
    if not found:
        raise UserError(f"{file}: no rows in it")
    return found


def read_references(file: str) -> dict[str, list[str]]:
    """Right answers by turn, by `question_id`, of rows as MT-Bench's."""
    found = {}
    for where, record in records(file):
        try:
            row = rename(record, {"id": "question_id", "turns": "choices.0.turns"})
        except BadRow as error:
            raise UserError(f"{where}: {error}") from None
        found[str(row["id"])] = row["turns"]
    return found


def grade_answers(
    models: Mapping[str, Answers], judge: Reward, references: Mapping[str, Sequence[str]]
) -> tuple[list[Record], list[str], float]:
    """Every answer by itself, with the conversation before it (Zheng et al. 2023, arXiv 2306.05685, section 3.1).

    `references`: right answers by turn, by the `question_id` in a row's metadata. Returns the grades, why others are
    missing, and the highest score of an answer that says nothing.
    """
    scale: Any = judge.function
    said = [(name, before, answer) for name, answers in models.items() for before, answer in answers.items()]
    right = [dict(enumerate(references.get(str(a.metadata.get("question_id")), ()), 1)).get(a.turn) for *_, a in said]
    samples = [
        Sample(json.loads(before), a.text, reference, a.metadata, final=a.text)
        for (_, before, a), reference in zip(said, right, strict=True)
    ]
    graded = list(zip(said, compute_rewards(samples, [judge]), strict=True))
    marks = [
        {
            "model": name, "prompt": a.prompt, "turn": a.turn, "category": str(a.metadata.get("category", "")),
            "grade": scale.low + g.total * (scale.high - scale.low),
        }
        for (name, _, a), g in graded
        if not g.failures
    ]  # fmt: skip
    missing = [why for _, g in graded for why in g.failures.values()]
    return marks, missing, max(g.metrics.get("judge/canary", 0.0) for _, g in graded)


def grade_report(marks: Sequence[Record], models: Sequence[str], canary: float, judge: Reward) -> dict[str, Any]:
    """Of each model, over all prompts and by category: mean, 95% interval by prompt, and the mean of each turn."""
    scale: Any = judge.function
    rows = []
    for model in models:
        own = [mark for mark in marks if mark["model"] == model]
        categories = list(dict.fromkeys(mark["category"] for mark in own))
        for category in ["all", *(categories if len(categories) > 1 else [])]:
            some = [mark for mark in own if category in ("all", mark["category"])]
            mean, half = mean_and_half([fmean(grades) for grades in _grades(some, "prompt").values()])
            rows.append({
                "model": model, "category": category, "answers": len(some), "grade": mean,
                "low": max(scale.low, mean - half), "high": min(scale.high, mean + half),
                "turns": {str(turn): fmean(grades) for turn, grades in sorted(_grades(some, "turn").items())},
            })  # fmt: skip
    return {"judge": {"grades": len(marks), "low": scale.low, "high": scale.high, "canary": canary}, "models": rows}


def _grades(marks: Sequence[Record], name: str) -> dict[Any, list[float]]:
    found: dict[Any, list[float]] = defaultdict(list)
    for mark in marks:
        found[mark[name]].append(mark["grade"])
    return found


def mean_and_half(values: Sequence[float]) -> tuple[float, float]:
    """The mean of values of independent prompts, and half its 95% interval."""
    half = 1.96 * float(np.std(values, ddof=1)) / len(values) ** 0.5 if len(values) > 1 else math.inf
    return fmean(values), half


def compare_answers(models: Mapping[str, Answers], judge: Reward) -> tuple[list[Verdict], list[str], float]:
    """Every two models on the prompts that both answered.

    Returns:
        the verdicts, why others are missing, and the highest score of an answer that says nothing.
    """
    pairs = [(a, b, prompt) for a, b in combinations(models, 2) for prompt in models[a] if prompt in models[b]]
    if not pairs:
        raise UserError(f"{', '.join(models)} have no prompt in common")
    said = [(models[a][prompt].text, models[b][prompt].text) for a, b, prompt in pairs]
    asked = [i for i, (one, two) in enumerate(said) if one.strip() and two.strip()]
    samples = [Sample(json.loads(pairs[i][2]), said[i][0], said[i][1], final=said[i][0]) for i in asked]
    grades = dict(zip(asked, compute_rewards(samples, [judge]), strict=True))
    verdicts: list[Verdict] = []
    missing: list[str] = []
    canary = 0.0
    for i, ((a, b, prompt), (one, two)) in enumerate(zip(pairs, said, strict=True)):
        length = len(one) - len(two)
        if i not in grades:
            verdicts.append(Verdict(a, b, prompt, (1 + bool(one.strip()) - bool(two.strip())) / 2, False, None, length))
        elif grades[i].failures:
            missing += grades[i].failures.values()
        else:
            metrics = grades[i].metrics
            canary = max(canary, metrics["judge/canary"])
            contradiction = metrics["judge/contradiction"] == 1
            verdicts.append(Verdict(a, b, prompt, grades[i].total, contradiction, metrics["judge/first"], length))
    return verdicts, missing, canary


def fit(differences: Array, values: Array, weights: Array) -> Array:
    """[columns] of the logistic regression of values from 0 to 1, by Newton's method."""
    found = np.zeros(differences.shape[1])
    for _ in range(50):
        chance = 1 / (1 + np.exp(-differences @ found))
        gradient = differences.T @ (weights * (values - chance)) - RIDGE * found
        curvature = (differences.T * (weights * chance * (1 - chance))) @ differences + RIDGE * np.eye(len(found))
        step = np.linalg.solve(curvature, gradient)
        found += step
        if np.abs(step).max() < 1e-9:
            break
    return found


def rate(verdicts: Sequence[Verdict], models: Sequence[str]) -> Array:
    """[4, models] Bradley-Terry ratings, the ends of their 95% intervals from resampled prompts, and ratings with the
    length of answers, as a further reason to win, taken out; on Elo's scale: mean 1000, 400 points are odds of 10 to 1.

    Length is controlled as in AlpacaEval 2 (Dubois et al. 2024, arXiv 2404.04475, equation 2, without the prompts'
    difficulty): a term in tanh of the difference of lengths over its standard deviation.
    """
    prompts = {prompt: i for i, prompt in enumerate(dict.fromkeys(v.prompt for v in verdicts))}
    of_prompt = np.array([prompts[v.prompt] for v in verdicts])
    values = np.array([v.value for v in verdicts])
    sides = np.array([[(v.first == m) - float(v.second == m) for m in models] for v in verdicts])
    longer = np.array([float(v.longer) for v in verdicts])
    length = np.tanh(longer / (np.sqrt(np.mean(longer**2)) or 1.0))
    ones = np.ones(len(verdicts))
    random = np.random.default_rng(0)
    drawn = random.multinomial(len(prompts), np.full(len(prompts), 1 / len(prompts)), RESAMPLES)
    resampled = np.array([_elo(fit(sides, values, counts[of_prompt].astype(float))) for counts in drawn])
    low, high = np.quantile(resampled, [0.025, 0.975], axis=0)
    controlled = _elo(fit(np.column_stack([sides, length]), values, ones)[:-1])
    return np.stack([_elo(fit(sides, values, ones)), low, high, controlled])


def _elo(log_odds: Array) -> Array:
    return 1000 + 400 / np.log(10) * (log_odds - log_odds.mean())


def report(verdicts: Sequence[Verdict], models: Sequence[str], canary: float) -> dict[str, object]:
    """All figures, for a file and a table: of the judge, of each two models, of each model."""
    ratings = rate(verdicts, models)
    asked = [v for v in verdicts if v.shown_first is not None]
    long = [v.value if v.longer > 0 else 1 - v.value for v in verdicts if v.longer]
    pairs = []
    for a, b in combinations(models, 2):
        values = [v.value for v in verdicts if (v.first, v.second) == (a, b)]
        if not values:
            continue
        mean, half = mean_and_half(values)
        points = ratings[3, models.index(a)] - ratings[3, models.index(b)]
        pairs.append({
            "first": a, "second": b, "prompts": len(values), "wins": sum(v > 0.5 for v in values),
            "ties": sum(v == 0.5 for v in values), "losses": sum(v < 0.5 for v in values),
            "contradictory": sum(v.contradiction for v in verdicts if (v.first, v.second) == (a, b)),
            "win_rate": mean, "low": max(0.0, mean - half), "high": min(1.0, mean + half),
            "length_controlled": float(1 / (1 + 10 ** (-points / 400))),
        })  # fmt: skip
    names = ("rating", "low", "high", "length_controlled")
    rows = [
        {"model": m} | dict(zip(names, each, strict=True)) for m, each in zip(models, ratings.T.tolist(), strict=True)
    ]
    judge = {
        "verdicts": len(verdicts), "contradictory": fmean(v.contradiction for v in asked) if asked else 0.0,
        "shown_first": fmean(v.shown_first or 0.0 for v in asked) if asked else 0.5,
        "longer": fmean(long) if long else 0.5, "canary": canary,
    }  # fmt: skip
    return {"judge": judge, "pairs": pairs, "models": sorted(rows, key=lambda row: -row["rating"])}
