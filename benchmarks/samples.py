"""A GRPO step without a model: seconds and memory of all that is neither generation nor forward-backward.

    torchrun --standalone --nproc-per-node 4 -m benchmarks.samples --tokenizer DIR [--samples 2048] [--updates 1]

Every rank is a rollout replica and a data parallel rank. Its completions are drawn at random before the clock runs;
what follows is the package's own: texts and rewards, facts to all ranks, who trains what, tokens to them,
micro-batches, log-prob differences, and the rollout file. Memory is resident memory above that before a phase, with
the pages that freed memory left behind given back first.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoTokenizer

from megatron_posttrain.algorithms.policy import receive_samples
from megatron_posttrain.config.algorithms import GrpoConfig
from megatron_posttrain.config.schema import RewardConfig
from megatron_posttrain.data.dataset import Prompt
from megatron_posttrain.parallel.groups import make_groups, start_distributed
from megatron_posttrain.parallel.layout import Layout
from megatron_posttrain.planning.known_models import KNOWN_MODELS
from megatron_posttrain.platform import platform
from megatron_posttrain.rewards import load_rewards
from megatron_posttrain.rollout.engine import Completion, Sampling
from megatron_posttrain.rollout.samples import generate_samples, save_samples
from megatron_posttrain.training.sequences import sums_by_sequence

SAMPLES_PER_PROMPT, PROMPT_TOKENS, SHORTEST, LONGEST = 8, 256, 4000, 16384
REWARD = """from megatron_posttrain.rewards import reward


@reward("long")
def long(sample):
    return len(sample.final)
"""


class Drawn:
    """Completions that are there already, as an engine of one rank returns them."""

    tensor, version, choices = 1, 0, None

    def __init__(self, samples: int, vocabulary: int) -> None:
        self.replica, self.replicas = dist.get_rank(), dist.get_world_size()
        draw = np.random.default_rng(self.replica)
        lengths = draw.integers(SHORTEST, LONGEST - PROMPT_TOKENS, -(-samples // self.replicas), endpoint=True)
        self.completions = [
            Completion(draw.integers(0, vocabulary, n).tolist(), (-draw.random(n)).astype(np.float32).tolist(), "stop")
            for n in lengths
        ]

        self.at_once = len(self.completions)

    def run(self, feed: Any, take: Any, sampling: Sampling, enough: Any) -> None:
        for name, completion in zip(feed(self.at_once, True), self.completions, strict=True):
            take(name, completion)
        self.completions = []


class Meter:
    """Seconds and the most resident memory of phases, all ranks beginning together.

    CPU seconds are this rank's own: where ranks share cores, wall seconds are those of all together.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.cpu_seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        dist.barrier()
        before, done = platform().used_memory_bytes(), threading.Event()
        seen = [before]

        def watch() -> None:
            while not done.wait(0.005):
                seen.append(platform().used_memory_bytes())

        watcher = threading.Thread(target=watch)
        watcher.start()
        start, cpu = time.perf_counter(), time.process_time()
        yield
        self.seconds[phase] = time.perf_counter() - start
        self.cpu_seconds[phase] = time.process_time() - cpu
        done.set()
        watcher.join()
        self.peaks[phase] = max(*seen, platform().used_memory_bytes()) - before


def measure(tokenizer_path: str, count: int, updates: int, folder: Path) -> dict[str, Any]:
    (folder / "rewards.py").write_text(REWARD)
    tokenizer, rewards = (
        AutoTokenizer.from_pretrained(tokenizer_path),
        load_rewards([RewardConfig(name="long", file=str(folder / "rewards.py"))]),
    )
    groups = make_groups(Layout(world_size=dist.get_world_size()), 0)
    config = GrpoConfig.model_validate(
        {
            "model": {"path": "-"}, "data": {"train": "-", "sequence_length": LONGEST}, "output": "-",
            "training": {"steps": 1, "global_batch_size": count // updates, "micro_batch_size": 2},
            "rewards": [{"name": "math"}],
        }
    )  # fmt: skip
    message = [{"role": "user", "content": "?"}]
    prompts = [Prompt(i, [i % 50] * PROMPT_TOKENS, "", {}, message) for i in range(count // SAMPLES_PER_PROMPT)]
    rollout: Any = Drawn(count, min(len(tokenizer), 250))  # small ids are shared integers: lists cost less than vLLM's
    engine: Any = SimpleNamespace(groups=groups, arch=KNOWN_MODELS["Qwen3-8B"])
    meter = Meter()
    with meter("texts and rewards"):
        samples = generate_samples(rollout, tokenizer, prompts, rewards, Sampling(SAMPLES_PER_PROMPT), range(count))
    samples.advantages = torch.randn(count, generator=torch.Generator().manual_seed(0))
    with meter("tokens to their ranks, micro-batches"):
        batches = [batch for update in receive_samples(samples, engine, config) for batch in update]
    tokens = sum(batch.real_tokens for batch in batches)
    held = sum(
        value.nbytes
        for batch in batches
        for value in (batch.tokens, batch.labels, batch.loss_mask, batch.position_ids, *batch.extras.values())
    )
    with meter("log-prob differences"):
        own = [batch.extras["rollout_logprobs"] + 0.1 for batch in batches]
        values = [(mine - batch.extras["rollout_logprobs"]).abs() for mine, batch in zip(own, batches, strict=True)]
        samples.differences = sums_by_sequence(groups, batches, values, count).numpy()
    del batches, own, values
    with meter("rollout file"):
        save_samples(folder / "rollouts.jsonl", samples)
    return {"tokens": tokens, "micro_batch_bytes": held, **vars(meter)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="a directory that transformers reads")
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--updates", type=int, default=1, help="optimizer steps over them")
    args = parser.parse_args()
    start_distributed()
    with tempfile.TemporaryDirectory() as folder:
        mine = measure(args.tokenizer, args.samples, args.updates, Path(folder))
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, mine)
    if dist.get_rank() == 0:
        for phase in mine["seconds"]:
            seconds = max(rank["seconds"][phase] for rank in ranks)
            peak = max(rank["peaks"][phase] / rank["micro_batch_bytes"] for rank in ranks)
            cpu = max(rank["cpu_seconds"][phase] for rank in ranks)
            print(f"{phase:40} {seconds:6.2f} s, {cpu:5.2f} s of CPU; at most {peak:.2f} x its micro-batches")
        print(json.dumps(ranks))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
