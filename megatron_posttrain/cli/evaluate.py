"""`evaluate`: alone as one process, or under `torchrun`, where the engine's replicas share the prompts."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from megatron_posttrain.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="Hugging Face directory, tokenizer included")
    add("--data", required=True, metavar="FILE", help="JSONL of {messages or prompt, answer, metadata}")
    add("--reward", default="math", metavar="NAME", help="what grades a response (default: math)")
    add("--reward-file", metavar="FILE", help="Python file that defines NAME with @reward (default: built in)")
    add("--max-tokens", type=_positive, default=256, metavar="N", help="of a response (default: 256)")
    add("--temperature", type=_temperature, default=0.0, metavar="T", help="of sampling; 0: greedy (default: 0)")
    add("--samples", type=_positive, default=1, metavar="N", help="responses a prompt (default: 1)")
    add("--limit", type=_positive, metavar="N", help="only the first N rows (default: all)")
    add("--seed", type=int, default=0, help="of sampling (default: 0)")
    add("--dtype", choices=("auto", "fp32", "bf16"), default="auto", help="auto: as stored (default)")
    add("--tensor", type=_positive, default=1, metavar="N", help="tensor parallel ranks of an engine (default: 1)")
    add("--output", default="runs/evaluation", metavar="DIR", help="default: runs/evaluation")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _temperature(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not 0 or more")
    return value


def run(args: argparse.Namespace) -> int:
    # First, before torch: it sets what vLLM and OpenMP read from the environment at their import.
    from megatron_posttrain.rollout import RolloutEngine, Sampling

    # isort: split
    import torch
    import torch.distributed as dist

    from megatron_posttrain.checkpoint.hf import HfReader, check_directory
    from megatron_posttrain.config.schema import RewardConfig
    from megatron_posttrain.data.dataset import PromptDataset
    from megatron_posttrain.data.rows import read_rows
    from megatron_posttrain.data.tokenize import load_tokenizer
    from megatron_posttrain.evaluation.evaluate import evaluate, save, table
    from megatron_posttrain.parallel.groups import start_distributed
    from megatron_posttrain.rewards import load_rewards

    _, architecture = check_directory(args.model)
    tokenizer = load_tokenizer(args.model)
    rewards = load_rewards([RewardConfig(name=args.reward, file=args.reward_file)])
    rows = read_rows(args.data)[: args.limit]
    unanswered = next((row for row in rows if row.answer is None), None)
    if unanswered and args.reward == "math" and not args.reward_file:
        raise UserError(f"{unanswered.source}: no `answer`, which the reward 'math' compares with")
    prompts = PromptDataset(rows, tokenizer, sys.maxsize).prompts
    longest = max(prompts, key=lambda prompt: len(prompt.token_ids))
    max_model_len = len(longest.token_ids) + args.max_tokens
    if max_model_len > architecture.max_position:
        raise UserError(
            f"--max-tokens {args.max_tokens}: with the {len(longest.token_ids)} tokens of the prompt at "
            f"{rows[longest.index].source} that is {max_model_len}; the model allows {architecture.max_position}"
        )
    start_distributed()
    if dist.get_world_size() % args.tensor:
        raise UserError(f"--tensor {args.tensor} does not divide the {dist.get_world_size()} processes")
    stored = HfReader(args.model)
    named = {"fp32": torch.float32, "bf16": torch.bfloat16}
    engine = RolloutEngine(
        args.model,
        dtype=named.get(args.dtype) or stored.dtype(next(iter(stored.names()))),
        max_model_len=max_model_len,
        tensor=args.tensor,
        gpu_memory_utilization=0.9,
    )
    sampling = Sampling(args.samples, args.max_tokens, args.temperature)
    evaluation, records = evaluate(engine, tokenizer, prompts, rewards, sampling, args.seed)
    if dist.get_rank() == 0:
        facts: dict[str, Any] = {"model": str(args.model), "data": str(args.data), "graded_by": args.reward}
        save(evaluation, records, Path(args.output), facts)
        print(table(evaluation, facts))
        print(f"\nwritten to {args.output}/evaluation.json and responses.jsonl")
    engine.close()
    dist.destroy_process_group()
    return 0
