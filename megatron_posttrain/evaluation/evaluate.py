"""Generate with vLLM, grade with a reward, sum up. A data-parallel evaluation: replicas share the prompts."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_posttrain.data.dataset import Prompt
from megatron_posttrain.errors import UserError
from megatron_posttrain.rewards import Reward
from megatron_posttrain.rollout import RolloutEngine, Sampling
from megatron_posttrain.rollout.samples import generate_samples
from megatron_posttrain.rollout.turns import ONE_TURN, Turns

CORRECT = 0.5  # a response whose reward is above it counts as correct


@dataclass(frozen=True)
class Evaluation:
    """`accuracy` is the fraction of correct responses; its interval is Wilson's at 95% over the prompts."""

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


def wilson_interval(fraction: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Score interval of a proportion `fraction` of `n` trials (Wilson 1927); z = 1.96 is 95%."""
    if n == 0:
        return 0.0, 1.0
    center = (fraction + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(fraction * (1 - fraction) / n + z * z / (4 * n * n))
    return max(0.0, center - half), min(1.0, center + half)


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
    lines = b"".join(samples.to_first_rank(records)).splitlines()
    # What every rank knows of every sample.
    known = zip(samples.rewards.tolist(), samples.sampled.tolist(), samples.truncated.tolist(), strict=True)
    facts = [{"reward": r, "tokens": n, "finish_reason": "length" if cut else "stop"} for r, n, cut in known]
    return _summary(facts, sampling, len(prompts), samples.seconds), [json.loads(line) for line in lines]


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


def save(evaluation: Evaluation, records: Sequence[dict[str, Any]], output: Path, facts: dict[str, Any]) -> None:
    """Writes OUTPUT/evaluation.json (`facts` first) and OUTPUT/responses.jsonl."""
    output.mkdir(parents=True, exist_ok=True)
    summary = json.dumps(facts | asdict(evaluation), indent=2, ensure_ascii=False)
    (output / "evaluation.json").write_text(summary + "\n", encoding="utf-8")
    with (output / "responses.jsonl").open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def table(evaluation: Evaluation, facts: dict[str, Any]) -> str:
    """The summary as text, a line per figure."""
    e = evaluation
    how = "greedy" if e.temperature == 0 else f"temperature {e.temperature:g}"
    lines = {
        **{name.replace("_", " "): value for name, value in facts.items()},
        "prompts": f"{e.prompts} x {e.samples} responses, {how}, at most {e.max_tokens} tokens",
        "accuracy": f"{e.accuracy:.3f}   95% interval {e.accuracy_low:.3f} to {e.accuracy_high:.3f}",
        "mean reward": f"{e.reward:.3f}",
        "mean response": f"{e.response_length:.1f} tokens, {e.truncated_fraction:.1%} truncated",
        "generation": f"{e.seconds:.1f} s, {e.tokens_per_second:,.0f} tokens/s",
    }
    width = max(map(len, lines))
    return "\n".join(f"{name:{width}}  {value}" for name, value in lines.items())
