"""The samples of one RL step: what was asked, what was said, and what it was worth."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_posttrain.config.algorithms import GrpoConfig
from megatron_posttrain.data.batch import Sequence as TokenSequence
from megatron_posttrain.data.dataset import Prompt
from megatron_posttrain.rewards.registry import Reward, Sample, compute_rewards
from megatron_posttrain.rollout.engine import Completion, RolloutEngine, Sampling
from megatron_posttrain.rollout.text import response_text, split_response, stop_token_ids


@dataclass
class Samples:
    """Of a step, the samples of a prompt one after the other; the same on every rank."""

    prompts: list[Prompt]  # of every sample
    completions: list[Completion]
    texts: list[str]
    rewards_by_name: list[dict[str, float]]
    rewards: list[float]
    seconds: float  # of generation, the slowest replica's
    advantages: Tensor = field(default_factory=lambda: torch.empty(0))  # [samples]
    token_fields: dict[str, list[list[float]]] = field(default_factory=dict)  # by name, of every response token

    @property
    def tokens(self) -> int:
        return sum(len(p.token_ids) + len(c.token_ids) for p, c in zip(self.prompts, self.completions, strict=True))

    def set_logprobs(self, name: str, sequences: Sequence[Tensor]) -> None:
        """Keeps the responses' part of [length - 1] log-probs of prompt and response."""
        self.token_fields[name] = [
            values[len(prompt.token_ids) - 1 :].tolist() for prompt, values in zip(self.prompts, sequences, strict=True)
        ]

    def logprob_differences(self) -> list[float]:
        """Mean |trainer - engine| of each sample's tokens, nats."""
        own = self.token_fields["old_logprobs"]
        return [
            float(np.abs(np.subtract(c.logprobs, mine)).mean()) if mine else 0.0
            for c, mine in zip(self.completions, own, strict=True)
        ]

    def metrics(self) -> dict[str, float]:
        count = len(self.completions)
        lengths = [len(c.token_ids) for c in self.completions]
        own = np.concatenate([np.asarray(x) for x in self.token_fields["old_logprobs"]])
        engine = np.concatenate([np.asarray(c.logprobs) for c in self.completions])
        by_name = {
            f"reward/{name}": sum(r[name] for r in self.rewards_by_name) / count for name in self.rewards_by_name[0]
        }
        return {
            "reward": sum(self.rewards) / count,
            "response_length": sum(lengths) / count,
            "truncated_fraction": sum(c.finish_reason == "length" for c in self.completions) / count,
            "logprob_difference": float(np.abs(own - engine).mean()),
            "tokens": self.tokens,
        } | (by_name if len(by_name) > 1 else {})


def collect_samples(
    rollout: RolloutEngine,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    rewards: Sequence[Reward],
    config: GrpoConfig,
    step: int,
) -> Samples:
    """Of a rollout step: a sample's seed depends on the run's seed, the step and its number."""
    sampling = Sampling(config.rollout.samples_per_prompt, config.rollout.max_tokens, config.rollout.temperature)
    sequence = np.random.SeedSequence([config.training.seed, step])
    seeds = sequence.generate_state(len(prompts) * sampling.n, np.uint32) >> 1
    return generate_samples(rollout, tokenizer, prompts, rewards, sampling, seeds.tolist())


def generate_samples(
    rollout: RolloutEngine,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    rewards: Sequence[Reward],
    sampling: Sampling,
    seeds: Sequence[int],
) -> Samples:
    """Collective: every replica generates and grades its share; every rank gets all of it.

    Args:
        sampling: `n` samples a prompt; they stop at the tokenizer's own tokens.
        seeds: one a sample, so that they do not depend on the number of replicas.
    """
    of_sample = [prompt for prompt in prompts for _ in range(sampling.n)]
    share = -(-len(of_sample) // rollout.replicas)
    where = slice(rollout.replica * share, (rollout.replica + 1) * share)
    mine = of_sample[where]
    single = replace(sampling, n=1, stop_token_ids=stop_token_ids(tokenizer))
    start = time.perf_counter()
    completions = rollout.generate([prompt.token_ids for prompt in mine], single, seeds[where])
    seconds = time.perf_counter() - start
    texts = [response_text(tokenizer, c.token_ids) for c in completions]
    graded: tuple[list[dict[str, float]], list[float]] = ([], [])
    if dist.get_rank() % rollout.tensor == 0:
        parts_of = (split_response(tokenizer, p.token_ids, c.token_ids) for p, c in zip(mine, completions, strict=True))
        said = [
            Sample(prompt.messages, text, prompt.answer, prompt.metadata, reasoning, final)
            for prompt, text, (reasoning, final) in zip(mine, texts, parts_of, strict=True)
        ]
        graded = compute_rewards(said, rewards)
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, (completions, texts, *graded, [seconds]))
    completions, texts, by_name, totals, times = (
        [item for part in parts[:: rollout.tensor] for item in part[i]] for i in range(5)
    )
    return Samples(of_sample, completions, texts, by_name, totals, max(times))


def training_sequences(samples: Samples) -> list[TokenSequence]:
    """Prompt and response of every sample; the response's tokens count."""
    sequences = []
    advantages = samples.advantages.tolist()
    for k, (prompt, completion) in enumerate(zip(samples.prompts, samples.completions, strict=True)):
        asked, said = len(prompt.token_ids), len(completion.token_ids)
        none = [0.0] * asked
        extras: dict[str, Sequence[float]] = {
            "rollout_logprobs": none + completion.logprobs,
            "advantages": none + [advantages[k]] * said,
        }
        extras |= {name: none + values[k] for name, values in samples.token_fields.items()}
        sequences.append(
            TokenSequence([*prompt.token_ids, *completion.token_ids], [0] * asked + [1] * said, extras, index=k)
        )
    return sequences


def write_rollouts(path: Path, samples: Samples) -> None:
    """One object a sample."""
    path.parent.mkdir(parents=True, exist_ok=True)
    differences = samples.logprob_differences()
    with path.open("w") as file:
        for k, (prompt, completion) in enumerate(zip(samples.prompts, samples.completions, strict=True)):
            record = {
                "index": prompt.index,
                "prompt": prompt.messages,
                "answer": prompt.answer,
                "response": samples.texts[k],
                "prompt_token_ids": prompt.token_ids,
                "token_ids": completion.token_ids,
                "reward": samples.rewards[k],
                "rewards": samples.rewards_by_name[k],
                "advantage": float(samples.advantages[k]),
                "finish_reason": completion.finish_reason,
                "logprob_difference": differences[k],
            }
            file.write(json.dumps(record) + "\n")
