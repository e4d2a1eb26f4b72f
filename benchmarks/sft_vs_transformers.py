"""SFT step of this trainer against a bare transformers + torch AdamW loop: same model, rows and packing.

Both sides run in this one process and take turns (A B A B ...), so that whatever else the machine does hits
both alike. Prints tokens/s of wall and CPU seconds, the median ratio with its spread, and the share of our
step that is neither forward-backward nor optimizer.

    python benchmarks/sft_vs_transformers.py [--steps 12] [--dense]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from megatron_posttrain.training.process import quiet_libraries

Mask = Callable[[list[int]], list[int]]  # 1 where a token counts

SIZES: dict[str, Any] = {
    "vocab_size": 4096,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 2048,
}


def make_model(directory: Path, dense: bool) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    if dense:
        Qwen3ForCausalLM(Qwen3Config(**SIZES, hidden_size=512, intermediate_size=1536)).save_pretrained(directory)
        return
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 384, "norm_topk_prob": True}
    config = Qwen3MoeConfig(**SIZES, hidden_size=256, intermediate_size=768, router_aux_loss_coef=0.0, **experts)
    Qwen3MoeForCausalLM(config).save_pretrained(directory)


def make_rows(count: int, sequence_length: int) -> list[list[list[int]]]:
    """Packed rows of conversations of 32 to 400 tokens."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for _ in range(count):
        row, room = [], sequence_length
        while room >= 32:
            length = min(room, int(torch.randint(32, 400, (), generator=generator)))
            row.append(torch.randint(0, SIZES["vocab_size"], (length,), generator=generator).tolist())
            room -= length
        rows.append(row)
    return rows


def every_token(ids: list[int]) -> list[int]:
    return [1] * len(ids)


def ours(directory: Path, mask: Mask = every_token) -> Callable[[list[Any]], dict[str, float]]:
    from megatron_posttrain.algorithms.losses import cross_entropy
    from megatron_posttrain.checkpoint.hf import check_directory
    from megatron_posttrain.config.algorithms import SftConfig
    from megatron_posttrain.data.batch import Sequence
    from megatron_posttrain.parallel.groups import make_groups, start_distributed
    from megatron_posttrain.parallel.layout import Layout
    from megatron_posttrain.training.batches import rank_micro_batches
    from megatron_posttrain.training.engine import Engine
    from megatron_posttrain.training.totals import per_token

    config = SftConfig.model_validate(
        {
            "model": {"path": str(directory)},
            "precision": {"dtype": "fp32"},
            "data": {"train": "-"},
            "optimizer": {"lr": 1e-4},
            "output": "-",
        }
    )
    start_distributed()
    groups = make_groups(Layout(), 0)
    engine = Engine.of(config, check_directory(directory)[1], groups)

    def step(rows: list[list[list[int]]]) -> dict[str, float]:
        batch = [[Sequence(ids, mask(ids)) for ids in row] for row in rows]
        result = engine.train_step(rank_micro_batches(batch, groups, 1), cross_entropy, per_token, 1e-4)
        return {"loss": result.loss} | result.seconds

    return step


def bare(directory: Path, mask: Mask = every_token) -> Callable[[list[Any]], dict[str, float]]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)

    def step(rows: list[list[list[int]]]) -> dict[str, float]:
        counted = sum(sum(mask(ids)[1:]) for row in rows for ids in row)
        total = 0.0
        for row in rows:
            ids = torch.tensor([t for sequence in row for t in sequence])
            positions = torch.cat([torch.arange(len(sequence)) for sequence in row])
            shifted = [[*(t if m else -100 for t, m in zip(s[1:], mask(s)[1:], strict=True)), -100] for s in row]
            labels = torch.tensor([label for sequence in shifted for label in sequence])
            # Positions that start again make transformers attend within each sequence only.
            logits = model(ids[None], position_ids=positions[None], use_cache=False).logits[0]
            loss = F.cross_entropy(logits.float(), labels, reduction="sum") / counted
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": total}

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12, help="timed steps of each side (default: 12)")
    parser.add_argument("--rows", type=int, default=4, help="packed rows a step (default: 4)")
    parser.add_argument("--sequence-length", type=int, default=1024, help="tokens a row (default: 1024)")
    parser.add_argument("--dense", action="store_true", help="a dense model instead of a mixture of experts")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    args = parser.parse_args()
    quiet_libraries()
    with tempfile.TemporaryDirectory() as temporary:
        make_model(Path(temporary), args.dense)
        sides = {"ours": ours(Path(temporary)), "bare": bare(Path(temporary))}
    torch.set_num_threads(args.threads)
    timings: dict[str, list[dict[str, float]]] = {"ours": [], "bare": []}
    for number in range(args.steps + 2):
        rows = make_rows(args.rows, args.sequence_length)
        for name, step in sides.items():
            wall, cpu = time.perf_counter(), time.process_time()
            facts = step(rows)
            facts |= {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
            if number >= 2:  # the first two warm up allocators and caches
                timings[name].append(facts)
    tokens = sum(len(ids) for row in rows for ids in row)
    report(timings, tokens, "dense" if args.dense else "moe")


def report(timings: dict[str, list[dict[str, float]]], tokens: int, kind: str) -> None:
    ratios = {
        clock: [b[clock] / a[clock] for a, b in zip(timings["ours"], timings["bare"], strict=True)]
        for clock in ("wall", "cpu")
    }
    for name, steps in timings.items():
        wall, cpu = (statistics.median(s[c] for s in steps) for c in ("wall", "cpu"))
        print(f"{name}: {tokens / wall:,.0f} tokens/s, {tokens / cpu:,.0f} tokens per CPU second")
    result: dict[str, Any] = {"model": kind, "steps": len(timings["ours"]), "tokens_a_step": tokens}
    for clock, values in ratios.items():
        low, middle, high = statistics.quantiles(values, n=4)
        result[f"ratio_{clock}"] = round(middle, 3)
        print(f"ours / bare by {clock} seconds: {middle:.3f} (quartiles {low:.3f} to {high:.3f}; goal 1.0 or more)")
    other = [1 - (s["forward_backward"] + s["optimizer"]) / s["wall"] for s in timings["ours"]]
    result["share_of_other_work"] = round(statistics.median(other), 4)
    print(f"neither forward-backward nor optimizer: {statistics.median(other):.2%} of our step (goal: under 3%)")
    difference = max(abs(a["loss"] - b["loss"]) for a, b in zip(timings["ours"], timings["bare"], strict=True))
    print(f"largest difference of the two losses: {difference:.2e}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
