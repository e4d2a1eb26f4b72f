"""Refit against a copy of the same bytes in memory and against whole tensors loaded on every rank, in turns.

    torchrun --nproc-per-node 2 -m benchmarks.refit [--gigabytes 1.0] [--rounds 2]

A mixture of experts of random weights, trained on pipeline stages, into one engine of all ranks with whole experts on
each (`rollout.expert`). Printed are medians over the rounds of seconds and of CPU seconds of all ranks together.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import Qwen3MoeConfig

from megatron_posttrain.config.schema import ModelConfig, PrecisionConfig
from megatron_posttrain.models import registry
from megatron_posttrain.models.build import build_model
from megatron_posttrain.models.sharded import Exporter
from megatron_posttrain.parallel.groups import broadcast_object, make_groups, start_distributed
from megatron_posttrain.parallel.layout import Layout
from megatron_posttrain.platform import platform
from megatron_posttrain.rollout.engine import RolloutEngine
from megatron_posttrain.rollout.refit import Refit

EXPERT_WIDTH, HIDDEN, EXPERTS = 768, 1024, 32  # 1.6 MB a matrix; of Qwen3-30B-A3B 3.1 MB


def measured(work: Callable[[], object]) -> tuple[float, float]:
    """(seconds, CPU seconds of all ranks)."""
    dist.barrier()
    start, used = time.perf_counter(), time.process_time()
    work()
    spent = torch.tensor(time.process_time() - used)
    dist.barrier()
    seconds = time.perf_counter() - start
    dist.all_reduce(spent)
    return seconds, spent.item()


def main() -> None:
    parser = argparse.ArgumentParser(description="Refit against a memory copy and whole tensors on every rank")
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of the model in bf16 (default: 1.0)")
    parser.add_argument("--rounds", type=int, default=2, help="in each of which every side has its turn (default: 2)")
    options = parser.parse_args()
    start_distributed()
    torch.set_num_threads(1)
    world = dist.get_world_size()
    of_layer = 2 * 3 * EXPERTS * EXPERT_WIDTH * HIDDEN
    layers = max(world, round(options.gigabytes * 1e9 / of_layer / world) * world)
    config = Qwen3MoeConfig(
        vocab_size=1024, hidden_size=HIDDEN, intermediate_size=HIDDEN, moe_intermediate_size=EXPERT_WIDTH,
        num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=4, head_dim=64, num_experts=EXPERTS,
        num_experts_per_tok=4, max_position_embeddings=256, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:
        path = Path(broadcast_object(directory))
        if dist.get_rank() == 0:
            config.architectures = ["Qwen3MoeForCausalLM"]
            config.save_pretrained(path)
        dist.barrier()
        arch = registry.architecture_from_hf(json.loads((path / "config.json").read_text()))
        layout = Layout(world_size=world, pipeline=world)
        model = ModelConfig(path=str(path), random_init=True)
        groups = make_groups(layout, 0)
        modules, _ = build_model(arch, layout, model, PrecisionConfig(dtype="bf16"))
        engine = RolloutEngine(
            str(path), dtype=torch.bfloat16, max_model_len=64, tensor=world, expert=world > 1, load_weights=False
        )
        exporter = Exporter(modules, arch, groups)
        compare(Refit(engine, exporter), exporter, options.rounds)
        engine.close()


def compare(refit: Refit, exporter: Exporter, rounds: int) -> None:
    versions = itertools.count()
    with platform().megatron():
        refit.from_trainer(next(versions))
    held = torch.ones(refit.shares.received // 2, dtype=torch.bfloat16)
    naive = Refit(refit.engine)

    def shares() -> None:
        with platform().megatron():
            refit.from_trainer(next(versions))

    def whole() -> None:
        with platform().megatron():
            naive.update(exporter.hf_tensors(), next(versions))

    def copy() -> None:
        held.clone()

    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for _ in range(rounds):
        for name, work in (("copy in memory", copy), ("refit", shares), ("whole tensors on every rank", whole)):
            found[name].append(measured(work))
    if dist.get_rank():
        return
    print(f"{refit.shares.received / 1e9:.2f} GB received by a rank, {len(refit.shares.wanted)} tensors")
    for name, times in found.items():
        seconds, cpu = (statistics.median(column) for column in zip(*times, strict=True))
        print(
            f"{name:<32}{seconds:8.2f} s   {cpu:8.2f} CPU s   {refit.shares.received / 1e9 / seconds:6.2f} GB/s a rank"
        )
    digests = refit.digest_seconds
    print(f"{'of it comparing digests':<32}{digests:8.2f} s")


if __name__ == "__main__":
    main()
