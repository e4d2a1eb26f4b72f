"""The samples of one RL step: what was asked, what was said, and what it was worth."""

import io
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from pydantic_core import to_json
from torch import Tensor

from megatron_posttrain.config.algorithms import GrpoConfig
from megatron_posttrain.data.batch import Sequence as TokenSequence
from megatron_posttrain.data.dataset import Prompt
from megatron_posttrain.data.messages import Message
from megatron_posttrain.environments.dialogue import read_calls
from megatron_posttrain.parallel.exchange import exchange, gather_rows, gathered, summed, to_first_rank
from megatron_posttrain.rewards.grading import Grade, Grading, check_values, metric_sums
from megatron_posttrain.rewards.registry import Reward, Sample
from megatron_posttrain.rollout.at_once import with_run
from megatron_posttrain.rollout.engine import RolloutEngine, Sampling
from megatron_posttrain.rollout.handout import Handout
from megatron_posttrain.rollout.in_flight import InFlight
from megatron_posttrain.rollout.text import response_text, split_response, stop_token_ids
from megatron_posttrain.rollout.turns import ONE_TURN, Episode, Turns, converse

Floats = NDArray[np.float64]


@dataclass
class Samples:
    """Of a step, n samples, those of a prompt one after the other.

    Arrays [n] and prompts are of all samples and the same on every rank. Tokens, their log-probs and texts are
    of the `drawn` ones only, on the replica that drew them.
    """

    prompts: list[Prompt]  # of every sample
    lengths: NDArray[np.int64]  # [n] tokens of the response, and of what an environment said
    sampled: NDArray[np.int64]  # [n] of these, tokens that the model drew
    truncated: NDArray[np.bool_]  # [n] stopped by max_tokens
    rewards: Floats  # [n]; a masked sample's: the mean of its prompt's others, which moves no baseline
    rewards_by_name: dict[str, Floats]  # each [n]; NaN where a sample could not be graded
    masked: NDArray[np.bool_]  # [n] does not train, since a reward could not grade it
    drawn: Sequence[int]
    token_ids: list[NDArray[np.int32]]  # of each drawn sample: its response
    logprobs: list[NDArray[np.float32]]  # of each drawn sample, the engine's; NaN where the model drew no token
    messages: list[list[Message]]  # of each drawn sample, on the first rank of a replica: its turns
    texts: list[str]  # as the messages: all that follows the prompt
    grades: list[Grade]  # as the messages
    logged: dict[str, float]  # by rewards and environments, means over the samples
    ranks_per_replica: int
    replica_of: NDArray[np.int64]  # [n] that drew it
    versions: NDArray[np.int64]  # [n] of the oldest weights that drew a token of it
    seconds: float = 0.0  # of generation, the slowest replica's
    left: list[Episode] = field(default_factory=list)  # samples of other prompts, not complete; the same on every rank
    choices: np.dtype[Any] | None = None  # of a token's experts, where they are replayed
    experts: list[NDArray[Any]] = field(default_factory=list)  # of each drawn sample: of all tokens but its last
    advantages: Tensor = field(default_factory=lambda: torch.empty(0))  # [n]
    differences: Floats = field(default_factory=lambda: np.empty(0))  # [n] sums of |trainer - engine| log-probs, nats
    by_token: dict[str, list[Tensor]] = field(
        default_factory=dict
    )  # of each sample, figures of all tokens but the first

    @property
    def total_lengths(self) -> list[int]:
        """[n] tokens of prompt and response."""
        return [len(p.token_ids) + n for p, n in zip(self.prompts, self.lengths.tolist(), strict=True)]

    @property
    def tokens(self) -> int:
        return sum(self.total_lengths)

    def finish_reason(self, sample: int) -> Literal["stop", "length"]:
        return "length" if self.truncated[sample] else "stop"

    def metrics(self) -> dict[str, float]:
        count = len(self.prompts)
        by_name: dict[str, float] = {}
        for name, values in self.rewards_by_name.items():
            graded = values[~np.isnan(values)]
            by_name |= {f"reward/{name}": float(graded.mean())} if len(graded) and len(self.rewards_by_name) > 1 else {}
            by_name |= {f"reward/{name}/failed_fraction": 1 - len(graded) / count} if len(graded) < count else {}
        if self.masked.any():
            by_name["masked_fraction"] = float(self.masked.mean())
        begins = [k for k, p in enumerate(self.prompts) if k == 0 or p.index != self.prompts[k - 1].index]
        if len(begins) < count:
            least, most = np.minimum.reduceat(self.rewards, begins), np.maximum.reduceat(self.rewards, begins)
            by_name["equal_fraction"] = float((least == most).mean())
        return (
            {
                "reward": sum(self.rewards.tolist()) / count,
                "response_length": int(self.sampled.sum()) / count,
                "truncated_fraction": int(self.truncated.sum()) / count,
                "logprob_difference": float(self.differences.sum()) / max(1, int(self.sampled[~self.masked].sum())),
                "tokens": self.tokens,
            }
            | by_name
            | self.logged
        )

    def receive(self, wanted: Sequence[Sequence[int]], data_rank: int) -> Callable[[int], TokenSequence]:
        """Collective over all ranks: each gets the tokens of the samples that it trains on, and no others.

        Args:
            wanted: of every data parallel rank, its samples; the same on all ranks.
            data_rank: this rank's.

        Returns the training sequence of a sample that this rank wanted.
        """
        rank, world = dist.get_rank(), dist.get_world_size()
        row = 0 if self.choices is None else self.choices.itemsize
        words = -(-(np.array(self.total_lengths) - 1) * row // 4)  # int32 of each sample's experts
        data_ranks = gather_rows(torch.tensor([data_rank])).flatten().tolist()
        sent = [[i for i in wanted[data_ranks[r]] if self._source(i, r) == rank] for r in range(world)]
        received: list[list[int]] = [[] for _ in range(world)]
        for i in wanted[data_rank]:
            received[self._source(i, rank)].append(i)
        parts = [np.empty(0, np.int32)]
        place = {sample: k for k, sample in enumerate(self.drawn)}
        for k in (place[i] for to_rank in sent for i in to_rank):
            parts += [self.token_ids[k], self.logprobs[k].view(np.int32)]
            if self.choices is not None:
                parts.append(
                    np.frombuffer(self.experts[k].tobytes().ljust(4 * int(words[self.drawn[k]]), b"\0"), np.int32)
                )
        sizes = [[int((2 * self.lengths + words)[items].sum()) for items in way] for way in (sent, received)]
        flat = exchange(torch.from_numpy(np.concatenate(parts)), *sizes).numpy()
        order = [i for from_rank in received for i in from_rank]
        ends = np.cumsum((2 * self.lengths + words)[order])[:-1]
        responses = dict(zip(order, np.split(flat, ends), strict=False))
        return lambda i: self._sequence(i, *np.split(responses[i], [self.lengths[i], 2 * self.lengths[i]]))

    def _source(self, sample: int, rank: int) -> int:
        """The rank that sends a sample to `rank`: the ranks of its replica share the work."""
        return int(self.replica_of[sample]) * self.ranks_per_replica + rank % self.ranks_per_replica

    def _sequence(
        self, sample: int, token_ids: NDArray[np.int32], logprobs: NDArray[np.int32], experts: NDArray[np.int32]
    ) -> TokenSequence:
        """Prompt and response; what the model drew counts, but nothing of a masked sample."""
        prompt = np.asarray(self.prompts[sample].token_ids, np.int32)
        drawn = np.concatenate([np.full(len(prompt), np.nan, np.float32), logprobs.view(np.float32)])
        counts = ~np.isnan(drawn) & ~self.masked[sample]
        extras = {"rollout_logprobs": np.nan_to_num(drawn), "advantages": counts * np.float32(self.advantages[sample])}
        chosen = None
        if self.choices is not None:
            chosen = np.frombuffer(experts.tobytes(), self.choices, count=len(drawn) - 1)
        return TokenSequence(np.concatenate([prompt, token_ids]), counts, extras, index=sample, experts=chosen)

    def to_first_rank(self, records: Iterable[Any]) -> Iterator[bytes]:
        """Collective: JSON lines of the drawn samples' records, as the first rank of each replica gives them, on rank 0
        in the samples' order; replica after replica, so that it never holds more than that order needs."""
        first, own = dist.get_rank() == 0, bytearray()
        mine = (to_json(record) + b"\n" for record in records)  # three times as fast as json
        for line in mine if not first and dist.get_rank() % self.ranks_per_replica == 0 else ():
            own += line
        received = to_first_rank(own, range(0, dist.get_world_size(), self.ranks_per_replica))
        left = np.bincount(self.replica_of)
        lines: list[Iterator[bytes]] = []
        for replica in self.replica_of.tolist() if first else ():
            while len(lines) <= replica:
                arrived = io.BytesIO(next(received))  # nothing of rank 0's own, which are made as they are wanted
                lines.append(arrived if lines else mine)
            yield next(lines[replica])
            left[replica] -= 1
            if not left[replica]:
                lines[replica] = iter(())
        yield from map(bytes, received)  # nothing, but other ranks must send


def collect_samples(
    rollout: RolloutEngine,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    rewards: Sequence[Reward],
    config: GrpoConfig,
    step: int,
    batch: int = 0,
    turns: Turns = ONE_TURN,
    **options: Any,
) -> Samples:
    """Of a rollout step: a sample's seed depends on the run's seed, the step, the batch in it, and its number.

    `options` are those of `generate_samples`.
    """
    asked = config.rollout
    sampling = Sampling(asked.samples_per_prompt, asked.max_tokens, asked.temperature, repetitions=asked.repetitions)
    sequence = np.random.SeedSequence([config.training.seed, step, batch])
    seeds = sequence.generate_state(len(prompts) * sampling.n, np.uint32) >> 1
    return generate_samples(rollout, tokenizer, prompts, rewards, sampling, seeds.tolist(), turns, **options)


def generate_samples(
    rollout: RolloutEngine,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    rewards: Sequence[Reward],
    sampling: Sampling,
    seeds: Sequence[int],
    turns: Turns = ONE_TURN,
    *,
    carried: Sequence[Episode] = (),
    wanted: int | None = None,
    in_flight: InFlight | None = None,
) -> Samples:
    """Collective: replicas generate as they have room and grade what they drew, while others are drawn; facts of it go
    to every rank.

    Args:
        sampling: `n` samples a prompt; they stop at the tokenizer's own tokens.
        seeds: one a sample, which are all that it depends on beside its prompt and the weights.
        carried: samples of other prompts, begun before, which come first and are completed.
        wanted: prompts, carried ones among them, after which the others are `left` as they are; None: all.
        in_flight: orders that are followed meanwhile.
    """
    rollout = with_run(rollout)
    of_sample = [prompt for prompt in prompts for _ in range(sampling.n)]
    episodes = [*carried, *(Episode(*each) for each in zip(of_sample, seeds, strict=True))]
    unit = 1 if all(item.per == "sample" for item in rewards) else sampling.n  # groups graded whole are never parted
    handout = Handout(rollout, len(episodes), unit, sampling.n, len(carried) // sampling.n, wanted)
    single = replace(sampling, n=1, stop_token_ids=stop_token_ids(tokenizer))
    start = time.perf_counter()
    grading = Grading(rewards)

    def grade(number: int) -> None:
        if dist.get_rank() % rollout.tensor == 0:
            grading.add(number, _said(tokenizer, episodes[number], turns))

    # Where some may be left for a later step none is graded before that is known: judges cost
    ended = grade if wanted is None else lambda number: None
    own = converse(rollout, tokenizer, episodes, single, turns, handout, ended, in_flight)
    seconds = float(gather_rows(torch.tensor(time.perf_counter() - start, dtype=torch.float32)).max())
    handout.forget()
    left: list[Episode] = []
    if wanted is not None:
        numbers, left = _complete(rollout, episodes, own, sampling.n, wanted)
        place = {number: k for k, number in enumerate(numbers)}
        episodes, own = [episodes[i] for i in numbers], [place[i] for i in own if i in place]
        for number in own:
            grade(number)
    samples = _samples(rollout, tokenizer, episodes, own, grading, turns, sampling.n)
    samples.seconds, samples.left = seconds, left
    return samples


def _complete(
    rollout: RolloutEngine, episodes: Sequence[Episode], own: Sequence[int], group: int, wanted: int
) -> tuple[list[int], list[Episode]]:
    """Collective: numbers of the samples of the first `wanted` prompts that are complete, and all other samples."""
    mine = {i: episodes[i] for i in own} if dist.get_rank() % rollout.tensor == 0 else {}
    ended = torch.zeros(len(episodes), dtype=torch.int32)
    ended[[i for i, e in mine.items() if e.finish_reason != "cut"]] = 1
    everywhere = gather_rows(ended).sum(0).view(-1, group)
    chosen = everywhere.all(1).nonzero().flatten()[:wanted].tolist()
    kept = {number for prompt in chosen for number in range(prompt * group, (prompt + 1) * group)}
    parts = gathered({i: e for i, e in mine.items() if i not in kept})
    begun = {i: e for part in parts for i, e in part.items()}
    return sorted(kept), [begun.get(i, e) for i, e in enumerate(episodes) if i not in kept]


def _samples(
    rollout: RolloutEngine,
    tokenizer: Any,
    episodes: Sequence[Episode],
    own: Sequence[int],
    grading: Grading,
    turns: Turns,
    group: int,
) -> Samples:
    """Collective: the replica's `own` episodes with their grades; facts of all go to every rank."""
    mine, rewards = [episodes[i] for i in own], grading.rewards
    said, grades = grading.grades(own) if dist.get_rank() % rollout.tensor == 0 else ([], [])
    check_values(rewards, grades)
    grades = list(map(_graded, mine, grades)) if said else []
    facts = torch.zeros(len(episodes), 7 + len(rewards), dtype=torch.float64)  # each from one rank
    for i, e, sample, grade in zip(own, mine, said, grades, strict=False):
        counts = len(e.token_ids), sample.tokens, e.finish_reason == "length", rollout.replica, e.version
        named = (grade.rewards.get(r.name, np.nan) for r in rewards)
        facts[i] = torch.tensor([*counts, grade.total, grade.masked, *named], dtype=torch.float64)
    known = summed(facts).numpy().T
    lengths, counted, truncated, replicas, versions = known[:5].astype(np.int64)
    named_turns = turns.metrics if said else []  # nothing of a replica's other ranks, which know no text
    turn_sums = {name: (float(sum(e.metrics[name] for e in mine)), len(mine)) for name in named_turns}
    return Samples(
        prompts=[e.prompt for e in episodes],
        lengths=lengths,
        sampled=counted,
        truncated=truncated.astype(bool),
        rewards=mask(known[5], known[6].astype(bool), group),
        rewards_by_name={r.name: values for r, values in zip(rewards, known[7:], strict=True)},
        masked=known[6].astype(bool),
        drawn=own,
        token_ids=[np.array(e.token_ids, np.int32) for e in mine],
        logprobs=[np.array(e.logprobs, np.float32) for e in mine],
        messages=[e.messages for e in mine] if said else [],
        texts=[
            response_text(tokenizer, e.token_ids) if e.begun else x.response
            for e, x in zip(mine, said, strict=bool(said))
        ],
        grades=grades,
        logged=_means({f"reward/{name}": pair for name, pair in metric_sums(grades).items()} | turn_sums),
        ranks_per_replica=rollout.tensor,
        replica_of=replicas,
        versions=versions,
        choices=rollout.choices,
        experts=[np.concatenate(e.experts) for e in mine if e.experts],
    )


def mask(totals: Floats, masked: NDArray[np.bool_], group: int) -> Floats:
    """[n] with the mean of a prompt's graded samples in place of the others; 0 where it has none."""
    graded = ~masked.reshape(-1, group)
    sums = (totals.reshape(-1, group) * graded).sum(1, keepdims=True)
    means = sums / np.maximum(1, graded.sum(1, keepdims=True))
    return np.where(masked, np.broadcast_to(means, graded.shape).reshape(-1), totals)


def _means(sums: dict[str, tuple[float, int]]) -> dict[str, float]:
    """Collective: means over the samples of all ranks; names may differ between ranks."""
    parts = gathered(sums)
    names = dict.fromkeys(name for part in parts for name in part)
    of = {name: [part[name] for part in parts if name in part] for name in names}
    return {name: sum(total for total, _ in pairs) / sum(count for _, count in pairs) for name, pairs in of.items()}


def _said(tokenizer: Any, episode: Episode, turns: Turns) -> Sample:
    """What rewards see: the last turn. One that still asks a tool has no answer, whatever the call holds."""
    sampled = int((~np.isnan(episode.logprobs)).sum())
    prompt, text = episode.prompt, response_text(tokenizer, episode.said)
    reasoning, final = split_response(tokenizer, episode.asked, episode.said, text)
    final = "" if read_calls(turns.form, final) else final
    if [m["role"] for m in episode.messages[-1:]] != ["assistant"]:  # one turn, or cut off
        episode.messages.append({"role": "assistant", "content": text})
    facts = prompt.messages, text, prompt.answer, prompt.metadata, reasoning, final
    return Sample(*facts, sampled, episode.finish_reason == "length", episode.reward)


def _graded(episode: Episode, grade: Grade) -> Grade:
    if not episode.failure:
        return grade
    return replace(grade, masked=True, failures={**grade.failures, "environment": episode.failure})


def save_samples(path: Path, samples: Samples) -> None:
    """Collective over all ranks; rank 0 writes one object a sample."""
    drawn = zip(samples.drawn, range(len(samples.grades)), strict=False)  # on first ranks
    lines = samples.to_first_rank(_record(samples, *sample) for sample in drawn)
    if dist.get_rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.writelines(lines)
    else:
        list(lines)


def _worth(samples: Samples, k: int) -> dict[str, Any]:
    """Of a sample that was graded."""
    return {
        "reward": float(samples.rewards[k]),
        "rewards": {name: float(x[k]) for name, x in samples.rewards_by_name.items() if not np.isnan(x[k])},
        "advantage": float(samples.advantages[k]),
        "logprob_difference": float(samples.differences[k]) / max(1, int(samples.sampled[k])),
    }


def _record(samples: Samples, k: int, mine: int) -> dict[str, Any]:
    """Of sample `k`, the replica's number `mine`."""
    prompt, failures, n = samples.prompts[k], samples.grades[mine].failures, int(samples.lengths[k])
    drawn = ~np.isnan(samples.logprobs[mine])
    turns = {} if drawn.all() else {"turns": samples.messages[mine], "mask": drawn.astype(int).tolist()}
    masked = bool(samples.masked[k])
    failed = {"failures": failures, "masked": masked} if failures or masked else {}
    return (
        {
            "sample": k,
            "index": prompt.index,
            "prompt": prompt.messages,
            "answer": prompt.answer,
            "response": samples.texts[mine],
            "prompt_token_ids": prompt.token_ids,
            "token_ids": samples.token_ids[mine].tolist(),
            "logprobs": np.nan_to_num(samples.logprobs[mine].astype(np.float64)).round(6).tolist(),  # the engine's
            "finish_reason": samples.finish_reason(k),
            "version": int(samples.versions[k]),
        }
        | (_worth(samples, k) if samples.rewards_by_name else {})
        | {name: [round(x, 4) for x in of[k][-n:].tolist()] for name, of in samples.by_token.items()}
        | turns
        | failed
    )
