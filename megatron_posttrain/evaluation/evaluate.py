"""Generate with vLLM, grade with a reward, sum up. A data-parallel evaluation: replicas share the prompts."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_posttrain.data.dataset import Prompt
from megatron_posttrain.errors import UserError
from megatron_posttrain.evaluation.perplexity import Perplexity
from megatron_posttrain.evaluation.statistics import clustered_interval, majority, pass_at_k, wilson_interval
from megatron_posttrain.rewards import Reward
from megatron_posttrain.rewards.extract import final_answer
from megatron_posttrain.rewards.normalize import normalize, number
from megatron_posttrain.rewards.response import split_reasoning
from megatron_posttrain.rewards.rules import chosen_letter
from megatron_posttrain.rollout import RolloutEngine, Sampling
from megatron_posttrain.rollout.samples import Samples, generate_samples
from megatron_posttrain.rollout.turns import ONE_TURN, Turns

CORRECT = 0.5  # a response whose reward is above it counts as correct


@dataclass(frozen=True)
class Evaluation:
    """`accuracy` is the fraction of correct responses (mean@k); its 95% interval counts prompts, not responses."""

    accuracy: float
    accuracy_low: float
    accuracy_high: float
    reward: float  # mean
    prompts: int
    samples: int  # a prompt
    response_length: float  # mean, tokens, the final stop token included
    truncated_fraction: float  # stopped by max_tokens
    temperature: float
    max_tokens: int
    seconds: float  # of generation
    tokens_per_second: float  # generated, all replicas together
    pass_at: dict[str, float] = field(default_factory=dict)  # unbiased, by k; several samples a prompt only
    corpus: float | None = None  # of all answers together, where the reward knows more of them than a mean
    majority: float | None = None  # accuracy of each prompt's most frequent answer; where the reward compares answers


def _number_or_text(answer: str) -> str:
    value = number(answer)
    return answer if value is None else str(value)


# How two responses are told to give the same answer, by the reward that grades them.
VOTES: dict[str, Callable[[str], str]] = {
    "math": lambda text: _number_or_text(normalize(final_answer(text))),
    "choice": lambda text: chosen_letter(text) or "",
    "exact": lambda text: " ".join(text.split()),
}


def evaluate(
    engine: RolloutEngine,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    rewards: Sequence[Reward],
    sampling: Sampling,
    seed: int = 0,
    turns: Turns = ONE_TURN,
) -> tuple[Evaluation, list[dict[str, Any]]]:
    """Collective over all ranks; all arguments but the engine are the same on all of them.

    Returns:
        the summary, and a record per response in the order of the prompts (index, sample, messages, answer,
        response, reward, rewards, tokens, finish_reason) on rank 0.

    Raises:
        UserError: a reward fails on a sample.
        ValueError: a prompt with `max_tokens` exceeds the engine's `max_model_len`.
    """
    seeds = range(seed, seed + len(prompts) * sampling.n)
    samples, records = respond(engine, tokenizer, prompts, rewards, sampling, seeds, turns)
    # What every rank knows of every sample.
    known = zip(samples.rewards.tolist(), samples.sampled.tolist(), samples.truncated.tolist(), strict=True)
    facts = [{"reward": r, "tokens": n, "finish_reason": "length" if cut else "stop"} for r, n, cut in known]
    summary = _summary(facts, sampling, len(prompts), samples.seconds)
    vote = VOTES.get(rewards[0].name) if len(rewards) == 1 else None
    if records and (corpus := getattr(rewards[0].function, "corpus", None)):
        answers = [split_reasoning(r["response"])[1] for r in records]
        summary = replace(summary, corpus=corpus(answers, [r["answer"] for r in records]))
    return replace(summary, **of_samples(records, vote)) if sampling.n > 1 and records else summary, records


def respond(
    engine: RolloutEngine,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    rewards: Sequence[Reward],
    sampling: Sampling,
    seeds: Sequence[int],
    turns: Turns = ONE_TURN,
) -> tuple[Samples, list[dict[str, Any]]]:
    """Collective: the graded responses, and on rank 0 a record of each; see `evaluate`."""
    samples = generate_samples(engine, tokenizer, prompts, rewards, sampling, seeds, turns)
    for name, values in samples.rewards_by_name.items():
        if failed := sum(map(math.isnan, values.tolist())):
            raise UserError(f"reward {name!r} failed on {failed} of {len(values)} samples; a warning above says why")
    records = [
        {
            "index": samples.prompts[k].index,
            "sample": k % sampling.n,
            "messages": samples.prompts[k].messages,
            "answer": samples.prompts[k].answer,
            "response": text,
            "reward": float(samples.rewards[k]),
            "rewards": {name: float(values[k]) for name, values in samples.rewards_by_name.items()},
            "tokens": int(samples.sampled[k]),
            "finish_reason": samples.finish_reason(k),
        }
        for k, text in zip(samples.drawn, samples.texts, strict=False)
    ]
    return samples, [json.loads(line) for line in b"".join(samples.to_first_rank(records)).splitlines()]


def by_prompt(records: Iterable[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The responses to each prompt, which stand one after the other."""
    return [list(group) for _, group in groupby(records, lambda record: record["index"])]


def of_samples(records: Sequence[dict[str, Any]], vote: Callable[[str], str] | None) -> dict[str, Any]:
    """What several responses a prompt tell: interval by prompt, pass@k for powers of two, accuracy of majorities."""
    prompts = by_prompt(records)
    right = [[r["reward"] > CORRECT for r in group] for group in prompts]
    n = len(right[0])
    low, high = clustered_interval([fmean(each) for each in right], n)
    ks = sorted({n, *(2**i for i in range(n.bit_length()))})
    found: dict[str, Any] = {"accuracy_low": low, "accuracy_high": high}
    found["pass_at"] = {str(k): fmean(pass_at_k(n, sum(each), k) for each in right) for k in ks}
    if vote is not None:
        answers = [[vote(split_reasoning(r["response"])[1]) for r in group] for group in prompts]
        found["majority"] = fmean(map(majority, answers, right))
    return found


def _summary(records: Sequence[dict[str, Any]], sampling: Sampling, prompts: int, seconds: float) -> Evaluation:
    accuracy = fmean(r["reward"] > CORRECT for r in records)
    # Responses to one prompt are not independent, so the prompts are the trials.
    low, high = wilson_interval(accuracy, prompts)
    tokens = sum(r["tokens"] for r in records)
    return Evaluation(
        accuracy=accuracy,
        accuracy_low=low,
        accuracy_high=high,
        reward=fmean(r["reward"] for r in records),
        prompts=prompts,
        samples=sampling.n,
        response_length=fmean(r["tokens"] for r in records),
        truncated_fraction=fmean(r["finish_reason"] == "length" for r in records),
        temperature=sampling.temperature,
        max_tokens=sampling.max_tokens,
        seconds=seconds,
        tokens_per_second=tokens / seconds if seconds else 0.0,
    )


def save(
    evaluation: Evaluation | Perplexity, records: Sequence[dict[str, Any]] | None, output: Path, facts: dict[str, Any]
) -> None:
    """Writes OUTPUT/evaluation.json (`facts` first) and, where there are records, OUTPUT/responses.jsonl."""
    output.mkdir(parents=True, exist_ok=True)
    summary = json.dumps(facts | asdict(evaluation), indent=2, ensure_ascii=False)
    (output / "evaluation.json").write_text(summary + "\n", encoding="utf-8")
    if records is not None:
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        with (output / "responses.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(lines)


def table(evaluation: Evaluation, facts: dict[str, Any]) -> str:
    """The summary as text, a line per figure."""
    e = evaluation
    how = "greedy" if e.temperature == 0 else f"temperature {e.temperature:g}"
    lines = {
        **{name.replace("_", " "): value for name, value in facts.items()},
        "prompts": f"{e.prompts} x {e.samples} responses, {how}, at most {e.max_tokens} tokens",
        "accuracy": f"{e.accuracy:.3f}   95% interval {e.accuracy_low:.3f} to {e.accuracy_high:.3f}",
        **{f"pass@{k}": f"{value:.3f}" for k, value in e.pass_at.items()},
        **({"majority": f"{e.majority:.3f}   most frequent of {e.samples} answers"} if e.majority is not None else {}),
        "mean reward": f"{e.reward:.3f}" + (f", {e.corpus:.4f} of all together" if e.corpus is not None else ""),
        "mean response": f"{e.response_length:.1f} tokens, {e.truncated_fraction:.1%} truncated",
        "generation": f"{e.seconds:.1f} s, {e.tokens_per_second:,.0f} tokens/s",
    }
    width = max(map(len, lines))
    return "\n".join(f"{name:{width}}  {value}" for name, value in lines.items())


def suite_table(results: Mapping[str, Evaluation | Perplexity]) -> str:
    """A line per set."""
    width = max(map(len, (*results, "set")))
    lines = [f"{'set':{width}} prompts   k  mean@k  95% interval     pass@k   maj@k  tokens  truncated"]
    for name, e in results.items():
        if isinstance(e, Perplexity):
            lines.append(f"{name:{width}} {e}")
            continue
        best = f"{list(e.pass_at.values())[-1]:.3f}" if e.pass_at else "-"
        vote = f"{e.majority:.3f}" if e.majority is not None else "-"
        lines.append(
            f"{name:{width}} {e.prompts:7} {e.samples:3}   {e.accuracy:.3f}  {e.accuracy_low:.3f} to "
            f"{e.accuracy_high:.3f}  {best:>6}  {vote:>6}  {e.response_length:6.0f}  {e.truncated_fraction:9.1%}"
        )
    return "\n".join(lines)
