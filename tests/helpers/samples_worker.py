"""Run under torchrun by test_samples.py: samples drawn by replicas reach the ranks that train them, and a file."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoTokenizer

from megatron_posttrain.config.schema import RewardConfig
from megatron_posttrain.data.dataset import Prompt
from megatron_posttrain.parallel.bridge import Bridge
from megatron_posttrain.parallel.groups import start_distributed
from megatron_posttrain.rewards import load_rewards
from megatron_posttrain.rollout.engine import Completion, Request, Sampling
from megatron_posttrain.rollout.regroup import deal, hand_over, join
from megatron_posttrain.rollout.samples import Samples, generate_samples, save_samples
from megatron_posttrain.training.process import finish
from tests.helpers.stand_in import StandIn

CHOICES = np.dtype((np.uint8, (3, 2)))


class Replayed(StandIn):
    """Completions that depend on the seed alone; few at once, so that replicas ask for more."""

    choices = CHOICES

    def __init__(self, tensor: int) -> None:
        self.tensor, self.at_once, self.version = tensor, 4, 7
        self.replica, self.replicas = dist.get_rank() // tensor, dist.get_world_size() // tensor
        groups = [dist.new_group(range(r * tensor, (r + 1) * tensor)) for r in range(self.replicas)]
        self.group = groups[self.replica]

    def share(self, value: object) -> object:
        box = [value]
        dist.broadcast_object_list(box, src=self.replica * self.tensor, group=self.group)
        return box[0]

    def answer(self, request: Request, sampling: Sampling) -> Completion:
        said = completion(request.seed)
        return replace(said, experts=experts(request.seed, len(request.prompt + said.token_ids)))


def experts(seed: int, tokens: int) -> Any:
    return np.random.default_rng(seed).integers(0, 8, (tokens - 1, 3, 2), np.uint8)


def completion(seed: int) -> Completion:
    draw = np.random.default_rng(seed)
    length = int(draw.integers(1, 40))
    logprobs = (-draw.random(length)).astype(np.float32)
    return Completion(draw.integers(20, 60, length).tolist(), logprobs.tolist(), "length" if seed % 3 else "stop")


def prompts(count: int) -> list[Prompt]:
    return [Prompt(i, list(range(1, 3 + i)), str(i), {}, [{"role": "user", "content": f"{i}?"}]) for i in range(count)]


def check(samples: Samples, wanted: list[list[int]], data_rank: int, seeds: list[int]) -> None:
    """Every wanted sample token by token, and none else."""
    sequence = samples.receive(wanted, data_rank)
    for i in wanted[data_rank]:
        said, asked, got = completion(seeds[i]), samples.prompts[i].token_ids, sequence(i)
        assert got.index == i
        assert got.token_ids.tolist() == asked + said.token_ids
        assert np.array_equal(got.experts, experts(seeds[i], len(got.token_ids)))
        assert got.loss_mask.tolist() == [False] * len(asked) + [True] * len(said.token_ids)
        assert got.extras["rollout_logprobs"].tolist() == [0.0] * len(asked) + said.logprobs
        advantages = [0.0] * len(asked) + [float(samples.advantages[i])] * len(said.token_ids)
        assert got.extras["advantages"].tolist() == advantages
    for i in set(range(len(samples.prompts))) - set(wanted[data_rank]):
        try:
            sequence(i)
        except KeyError:
            continue
        raise AssertionError(f"rank {dist.get_rank()} holds sample {i}, which it does not train on")


def check_cut_off(engine: Any, tokenizer: Any, rewards: Any, wanted: int) -> None:
    """A step that ends with `wanted` of its prompts, and the next one, which completes the others."""
    asked, sampling, n = prompts(wanted + 2), Sampling(3, 64), 3 * (wanted + 2)
    first = generate_samples(engine, tokenizer, asked, rewards, sampling, range(n), wanted=wanted)
    begun = {(e.prompt.index, e.seed): list(e.token_ids) for e in first.left}
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, begun)
    assert all(each == begun for each in everywhere)
    assert len(begun) == 6
    assert sorted([p.index for p in first.prompts] + [e.prompt.index for e in first.left]) == [i // 3 for i in range(n)]
    assert all(ids == completion(seed).token_ids[: len(ids)] for (_, seed), ids in begun.items())
    engine.version = 8
    later = [replace(prompt, index=10 + prompt.index) for prompt in asked[:wanted]]
    seeds = range(100, 100 + 3 * wanted)
    second = generate_samples(
        engine, tokenizer, later, rewards, sampling, seeds, carried=first.left, wanted=max(2, wanted)
    )
    assert [p.index for p in second.prompts[:6]] == [index for index, _ in begun]
    second.advantages = torch.zeros(len(second.prompts))
    sequence = second.receive([list(range(len(second.prompts)))] * 4, dist.get_rank())
    for i, ((_, seed), ids) in enumerate(begun.items()):
        said = sequence(i).token_ids.tolist()[len(second.prompts[i].token_ids) :]
        assert said[: len(ids)] == ids
        assert said == completion(seed).token_ids or ids
        assert second.versions[i] == (7 if ids else 8)


def check_bridge(bridge: Bridge, tokenizer: Any, rewards: Any, directory: Path) -> None:
    """Trainers have all tokens that rollout ranks drew, more replicas than trainers there are and fewer ranks."""
    for tensor in (1, 2):
        if bridge.generates:
            engine: Any = Replayed(tensor)
            hand_over(bridge, generate_samples(engine, tokenizer, prompts(5), rewards, Sampling(3, 64), range(15)))
            continue
        samples = hand_over(bridge)
        samples.advantages, samples.differences = torch.arange(15.0), np.arange(15.0)
        for data in (1, 2):
            check(samples, [[*range(r, 15, data)] for r in range(data)], dist.get_rank() % data, list(range(15)))
        save_samples(directory / f"{tensor}.jsonl", samples)
    assert not bridge.generates or bridge.tell(None) == ("leave", 0)


def main() -> None:
    torch.set_num_threads(1)
    job = json.loads(Path(sys.argv[1]).read_text())
    bridge = start_distributed(job.get("rollout_ranks", 0))
    tokenizer = AutoTokenizer.from_pretrained(job["tokenizer"])
    rewards = load_rewards([RewardConfig(name="long", weight=0.5, file=job["rewards"]), RewardConfig(name="math")])
    if bridge.group is not None:
        check_bridge(bridge, tokenizer, rewards, Path(job["out"]))
        job["cases"] = []
    for number, (tensor, count, data) in enumerate(job["cases"]):  # ranks a replica, prompts, data parallel ranks
        sampling = Sampling(3, 64)
        engine: Any = Replayed(tensor)
        samples = generate_samples(engine, tokenizer, prompts(count), rewards, sampling, range(3 * count))
        n = len(samples.prompts)
        samples.advantages = torch.randn(n, generator=torch.Generator().manual_seed(0))
        samples.differences = np.arange(n, dtype=np.float64)
        order = np.random.default_rng(number).permutation(n).tolist()
        check(samples, [order[rank::data] for rank in range(data)], dist.get_rank() % data, list(range(n)))
        more = generate_samples(engine, tokenizer, prompts(count), rewards, sampling, range(1000, 1000 + n))
        kept = [order[: n // 2], order[n // 2 :]]  # of either batch, from any replica
        joined = join([(part, i) for part, numbers in zip([samples, more], kept, strict=True) for i in numbers], {})
        joined.advantages = samples.advantages
        seeds = [*kept[0], *(1000 + i for i in kept[1])]
        assert joined.lengths.tolist() == [len(completion(seed).token_ids) for seed in seeds]
        check(joined, [order[rank::data] for rank in range(data)], dist.get_rank() % data, seeds)
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, joined)
        size = {1: 2, 2: 4, 4: 1}[tensor]
        dealt = deal(parts[0], parts[::tensor][dist.get_rank() // size :: 4 // size], 4 // size, size)
        check(dealt, [order[rank::data] for rank in range(data)], dist.get_rank() % data, seeds)
        save_samples(Path(job["out"]) / f"{number}.jsonl", samples)
        facts: list[Any] = [None] * dist.get_world_size()
        known = [samples.lengths.tolist(), samples.truncated.tolist(), samples.rewards.tolist(), samples.metrics()]
        dist.all_gather_object(facts, known)
        assert all(fact == known for fact in facts)
        check_cut_off(engine, tokenizer, rewards, count)
    finish()


if __name__ == "__main__":
    main()
