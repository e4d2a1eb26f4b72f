"""Log-prob differences between vLLM and the trainer, with and without routing replay, beside a dense model's.

    python -m benchmarks.routing_replay [--dtypes fp32 bf16] [--prompts 16] [--tokens 96]

Random models of one shape (4 layers, hidden 128; the dense MLP is as wide as the experts that a token is sent to) in
one process; four completions of a prompt at temperature 1.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from megatron_posttrain.checkpoint.hf import check_directory
from megatron_posttrain.config.schema import ModelConfig, PrecisionConfig
from megatron_posttrain.data.batch import Sequence
from megatron_posttrain.models.build import DTYPES
from megatron_posttrain.parallel.groups import make_groups, start_distributed
from megatron_posttrain.parallel.layout import Layout
from megatron_posttrain.rollout.engine import RolloutEngine, Sampling
from megatron_posttrain.rollout.routed_experts import choice_type
from megatron_posttrain.training.engine import Engine
from megatron_posttrain.training.routing import Action, routing
from megatron_posttrain.training.sequences import sequence_logprobs

SHAPE: dict[str, Any] = {
    "vocab_size": 286, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256, "initializer_range": 0.1,
    "tie_word_embeddings": False,
}  # fmt: skip
EXPERTS: dict[str, Any] = {"num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 64}


def make(directory: Path, *, experts: bool) -> str:
    torch.manual_seed(0)
    model: Any = (
        Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE, **EXPERTS, norm_topk_prob=True))
        if experts
        else Qwen3ForCausalLM(Qwen3Config(**SHAPE))
    )
    model.save_pretrained(directory)
    return str(directory)


def differences(path: str, dtype: Any, groups: Any, prompts: int, tokens: int) -> dict[str, np.ndarray]:
    """|trainer - engine| of every sampled token, nats: `own` routing and `replay`, the latter with experts only."""
    arch = check_directory(path)[1]
    choices = None if arch.moe is None else choice_type(arch)
    rollout = RolloutEngine(path, dtype=DTYPES[dtype], max_model_len=128, choices=choices)
    asked = [np.random.default_rng(i).integers(0, SHAPE["vocab_size"], 8 + i).tolist() for i in range(prompts)]
    said = rollout.generate(asked, Sampling(4, tokens), list(range(4 * prompts)))
    rollout.close()
    sequences = [
        Sequence(ids := asked[i // 4] + c.token_ids, [1] * len(ids), index=i, experts=c.experts)
        for i, c in enumerate(said)
    ]
    trainer = Engine(arch, groups, ModelConfig(path=path), PrecisionConfig(dtype=dtype))
    actions: dict[str, Action] = {"own": None}
    if arch.moe is not None:
        actions["replay"] = "replay"
    found = {}
    for name, action in actions.items():
        with routing(trainer, action):
            scored = sequence_logprobs(trainer, sequences, 1024)
        pairs = [(x[-len(c.token_ids) :].numpy(), c.logprobs) for x, c in zip(scored, said, strict=True)]
        found[name] = np.concatenate([np.abs(x - np.array(y)) for x, y in pairs])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=96, help="of a completion")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start_distributed()
    groups = make_groups(Layout(), 0)
    print("| model | dtype | routing | mean | p99 | largest |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as place:
        for name, experts in (("dense", False), ("experts", True)):
            path = make(Path(place, name), experts=experts)
            for dtype in arguments.dtypes:
                found = differences(path, dtype, groups, arguments.prompts, arguments.tokens)
                for routed, x in found.items():
                    row = f"{x.mean():.2g} | {np.quantile(x, 0.99):.2g} | {x.max():.2g}"
                    print(f"| {name} | {dtype} | {routed} | {row} |", flush=True)


if __name__ == "__main__":
    main()
