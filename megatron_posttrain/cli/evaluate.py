"""`evaluate`: alone as one process, or under `torchrun`, where the engine's replicas share the prompts."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from megatron_posttrain.cli.row_options import add_row_arguments
from megatron_posttrain.config.schema import EnvironmentConfig
from megatron_posttrain.errors import UserError
from megatron_posttrain.output import check_output

FILES = ("evaluation.json", "responses.jsonl")  # that it writes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="Hugging Face directory, tokenizer included")
    add("--data", required=True, metavar="FILE", help="rows of {messages or prompt or question, answer, metadata}")
    add_row_arguments(parser)
    add("--reward", default="math", metavar="NAME", help="what grades a response (default: math)")
    add("--reward-file", metavar="FILE", help="Python file that defines NAME with @reward (default: built in)")
    add(
        "--environment",
        type=_environment,
        metavar="NAME",
        help="what answers the model's turns, or all of the config's section: '{name: search, args: {files: [a.txt]}}'",
    )
    add("--max-tokens", type=_positive, default=256, metavar="N", help="of a response (default: 256)")
    add("--temperature", type=_temperature, default=0.0, metavar="T", help="of sampling; 0: greedy (default: 0)")
    add("--samples", type=_positive, default=1, metavar="N", help="responses a prompt (default: 1)")
    add("--limit", type=_positive, metavar="N", help="only the first N rows (default: all)")
    add("--seed", type=int, default=0, help="of sampling (default: 0)")
    add("--dtype", choices=("auto", "fp32", "bf16"), default="auto", help="auto: as stored (default)")
    add("--tensor", type=_positive, default=1, metavar="N", help="tensor parallel ranks of an engine (default: 1)")
    add("--output", default="runs/evaluation", metavar="DIR", help="default: runs/evaluation")


def _environment(text: str) -> EnvironmentConfig:
    found = yaml.safe_load(text)
    try:
        return EnvironmentConfig.model_validate(found if isinstance(found, dict) else {"name": found})
    except ValidationError as error:
        raise argparse.ArgumentTypeError(f"{error.errors()[0]['loc']}: {error.errors()[0]['msg']}") from None


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


@dataclass(frozen=True)
class Job:
    """A checked command line, and what was learned while checking it."""

    tokenizer: Any
    prompts: list[Any]
    rewards: list[Any]
    turns: Any
    max_model_len: int
    dtype: Any  # torch's


def run(args: argparse.Namespace) -> int:
    # First, before torch: it sets what vLLM and OpenMP read from the environment at their import.
    from megatron_posttrain.rollout import RolloutEngine, Sampling

    # isort: split
    import torch.distributed as dist

    from megatron_posttrain.evaluation.evaluate import evaluate, save, table
    from megatron_posttrain.parallel.groups import start_distributed
    from megatron_posttrain.platform.describe import refuse_unused_gpu
    from megatron_posttrain.training.process import quiet_libraries

    quiet_libraries()
    job = _checked(args)
    refuse_unused_gpu()
    start_distributed()
    engine = RolloutEngine(
        args.model,
        dtype=job.dtype,
        max_model_len=job.max_model_len,
        tensor=args.tensor,
        gpu_memory_utilization=0.9,
    )
    sampling = Sampling(args.samples, args.max_tokens, args.temperature)
    evaluation, records = evaluate(engine, job.tokenizer, job.prompts, job.rewards, sampling, args.seed, job.turns)
    if dist.get_rank() == 0:
        facts: dict[str, Any] = {"model": str(args.model), "data": str(args.data), "graded_by": args.reward}
        save(evaluation, records, Path(args.output), facts)
        print(table(evaluation, facts))
        print(f"\nwritten to {args.output}/evaluation.json and responses.jsonl")
    engine.close()
    dist.destroy_process_group()
    return 0


def _checked(args: argparse.Namespace) -> Job:
    """Raises UserError for whatever can be known before the engine is built."""
    from megatron_posttrain.checkpoint.hf import check_directory
    from megatron_posttrain.config.schema import RewardConfig, RolloutConfig
    from megatron_posttrain.data.dataset import PromptDataset
    from megatron_posttrain.data.rows import read_rows
    from megatron_posttrain.data.tokenize import load_tokenizer
    from megatron_posttrain.parallel.network import check_interfaces
    from megatron_posttrain.rewards import load_rewards
    from megatron_posttrain.rollout.turns import load_turns
    from megatron_posttrain.training.limits import check_answers, rows_with_tools

    check_output(Path(args.output), "--output", FILES)
    check_interfaces()
    _, architecture = check_directory(args.model)
    tokenizer = load_tokenizer(args.model)
    graded_by = [RewardConfig(name=args.reward, file=args.reward_file)]
    rewards = load_rewards(graded_by)
    rows = read_rows(args.data, columns=args.columns)[: args.limit]
    check_answers(rows, graded_by)
    turns = load_turns(args.environment, RolloutConfig(), tokenizer)
    rows = rows_with_tools(rows, turns.tools)
    prompts = PromptDataset(rows, tokenizer, sys.maxsize, omissions=args.omissions).prompts
    longest = max(prompts, key=lambda prompt: len(prompt.token_ids))
    max_model_len = len(longest.token_ids) + args.max_tokens
    if max_model_len > architecture.context_length:
        raise UserError(
            f"--max-tokens {args.max_tokens}: with the {len(longest.token_ids)} tokens of the prompt at "
            f"{rows[longest.index].source} that is {max_model_len}; the model allows {architecture.context_length}"
        )
    dtype = _dtype(args)
    _check_engine(args, architecture, max_model_len, dtype.itemsize)
    return Job(tokenizer, prompts, rewards, turns, max_model_len, dtype)


def _dtype(args: argparse.Namespace) -> Any:
    import torch

    from megatron_posttrain.checkpoint.hf import HfReader

    stored = HfReader(args.model)
    named = {"fp32": torch.float32, "bf16": torch.bfloat16}
    return named.get(args.dtype) or stored.dtype(next(iter(stored.names())))


def _check_engine(args: argparse.Namespace, architecture: Any, length: int, dtype_bytes: int) -> None:
    """Raises UserError for what vLLM would refuse, and for processes that are no whole engines."""
    from megatron_posttrain.platform import platform
    from megatron_posttrain.rollout.limits import EngineKeys, engine_problems

    keys = EngineKeys(tensor="--tensor", length="--max-tokens and the longest prompt", cache="vLLM's cache, GiB")
    wrong = engine_problems(
        architecture, platform().name, tensor=args.tensor, length=length, cache_bytes=None, dtype_bytes=dtype_bytes,
        keys=keys,
    )  # fmt: skip
    if told := "; ".join(wrong):
        raise UserError(told)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks % args.tensor:
        raise UserError(f"--tensor {args.tensor} does not divide the {ranks} processes")
