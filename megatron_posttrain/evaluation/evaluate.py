"""Generate with vLLM, grade with a reward, sum up. A data-parallel evaluation: replicas share the prompts."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch.distributed as dist

from megatron_posttrain.evaluation.perplexity import Perplexity
from megatron_posttrain.evaluation.responses import Record, Task, read_responses, respond
from megatron_posttrain.evaluation.statistics import clustered_interval, majority, pass_at_k, wilson_interval
from megatron_posttrain.output import columns, write_whole
from megatron_posttrain.rewards.extract import final_answer
from megatron_posttrain.rewards.normalize import normalize, number
from megatron_posttrain.rewards.response import split_reasoning
from megatron_posttrain.rewards.rules import chosen_letter
from megatron_posttrain.rollout import RolloutEngine, Sampling

CORRECT = 0.5  # a response whose reward is above it counts as correct
EVALUATION = "evaluation.json"


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
    seconds: float  # of generation, since it went on where it had been ended
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


def evaluate(engine: RolloutEngine, tokenizer: Any, task: Task, output: Path) -> Evaluation | None:
    """Collective, as `respond`, whose responses it leaves in `output`; the summary on rank 0."""
    seconds, tokens = respond(engine, tokenizer, task, output)
    if dist.get_rank():
        return None
    groups = read_responses(output)
    found = _summary([r for group in groups for r in group], task.sampling, len(groups), seconds, tokens)
    if corpus := getattr(task.rewards[0].function, "corpus", None):
        answers = [(split_reasoning(r["response"])[1], r["answer"]) for group in groups for r in group]
        found = replace(found, corpus=corpus(*map(list, zip(*answers, strict=True))))
    vote = VOTES.get(task.rewards[0].name) if len(task.rewards) == 1 else None
    return replace(found, **of_samples(groups, vote)) if task.sampling.n > 1 else found


def of_samples(prompts: Sequence[list[Record]], vote: Callable[[str], str] | None) -> dict[str, Any]:
    """What several responses a prompt tell: interval by prompt, pass@k for powers of two, accuracy of majorities."""
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


def _summary(
    records: Sequence[Record], sampling: Sampling, prompts: int, seconds: float, tokens: int = 0
) -> Evaluation:
    """Of the responses to so many prompts; `seconds` were needed for `tokens` of them."""
    accuracy = fmean(r["reward"] > CORRECT for r in records)
    # Responses to one prompt are not independent, so the prompts are the trials.
    low, high = wilson_interval(accuracy, prompts)
    return Evaluation(
        accuracy=accuracy, accuracy_low=low, accuracy_high=high, reward=fmean(r["reward"] for r in records),
        prompts=prompts, samples=sampling.n, response_length=fmean(r["tokens"] for r in records),
        truncated_fraction=fmean(r["finish_reason"] == "length" for r in records), temperature=sampling.temperature,
        max_tokens=sampling.max_tokens, seconds=seconds, tokens_per_second=tokens / seconds if seconds else 0.0,
    )  # fmt: skip


def save(evaluation: Evaluation | Perplexity, output: Path, facts: dict[str, Any]) -> None:
    """Writes OUTPUT/evaluation.json, `facts` first."""
    write_whole(output / EVALUATION, json.dumps(facts | asdict(evaluation), indent=2, ensure_ascii=False))


def saved(output: Path) -> Evaluation | Perplexity:
    """What `save` wrote."""
    found = json.loads((output / EVALUATION).read_text(encoding="utf-8"))
    kind = Perplexity if "perplexity" in found else Evaluation
    return kind(**{item.name: found[item.name] for item in fields(kind)})


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
    texts = {name: e for name, e in results.items() if isinstance(e, Perplexity)}
    lines = [["set", "prompts", "k", "mean@k", "95% interval", "pass@k", "maj@k", "tokens", "truncated"]]
    for name, e in results.items():
        if isinstance(e, Evaluation):
            best = f"{list(e.pass_at.values())[-1]:.3f}" if e.pass_at else "-"
            vote = f"{e.majority:.3f}" if e.majority is not None else "-"
            known = f"{e.accuracy:.3f}", f"{e.accuracy_low:.3f} to {e.accuracy_high:.3f}", best, vote
            end = f"{e.response_length:.0f}", f"{e.truncated_fraction:.1%}"
            lines.append([name, str(e.prompts), str(e.samples), *known, *end])
    found = [columns(lines)] if len(lines) > 1 else []
    return "\n".join([*found, *(f"{name}: {e}" for name, e in texts.items())])
