"""What `evaluate` and `sample` share: a checked model, sets of prompts, and the engine that answers them."""

import argparse
import hashlib
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_posttrain.cli.row_options import add_row_arguments, json_object
from megatron_posttrain.errors import UserError

# Options that say what one set is, and which field of an EvaluationSet each is.
SET_OPTIONS = (
    "columns", "environment", "max_tokens", "temperature", "top_p", "top_k", "preset", "samples", "limit",
)  # fmt: skip
REWARD_OPTIONS = ("reward", "reward_file", "reward_args")


def add_arguments(
    parser: argparse.ArgumentParser, max_tokens: int, samples: int, temperature: float = 0.0, required: bool = True
) -> None:
    add = parser.add_argument
    add("--model", required=required, metavar="DIR", help="Hugging Face directory, tokenizer included")
    add("--data", required=required, metavar="FILE", help="rows of {messages or prompt or question, answer, metadata}")
    add_row_arguments(parser)
    add("--reward", metavar="NAME", help="what grades a response (default: math)")
    add("--reward-file", metavar="FILE", help="Python file that defines NAME with @reward (default: built in)")
    add("--reward-args", type=json_object, metavar="JSON", help="the reward's parameters (default: {})")
    add("--max-tokens", type=positive, metavar="N", help=f"of a response (default: {max_tokens})")
    add("--samples", type=positive, metavar="N", help=f"responses a prompt (default: {samples})")
    add("--preset", metavar="NAME", help="greedy, qwen3-thinking or qwen3-non-thinking: what follows, and the "
        "template's thinking (default: none)")  # fmt: skip
    add("--temperature", type=float, metavar="T", help=f"of sampling; 0: greedy (default: the preset's, "
        f"{temperature:g} without one)")  # fmt: skip
    add("--top-p", type=float, metavar="P", help="of the likeliest tokens together (default: the preset's, 1)")
    add("--top-k", type=int, metavar="N", help="likeliest tokens; 0: all (default: the preset's, 0)")
    add("--limit", type=positive, metavar="N", help="only the first N rows (default: all)")
    add("--seed", type=int, default=0, help="of sampling (default: 0)")
    add("--save-every", type=positive, default=256, metavar="N", help="prompts after which responses are in the file "
        "for good; the same command goes on behind them (default: 256)")  # fmt: skip
    add("--dtype", choices=("auto", "fp32", "bf16"), default="auto", help="auto: as stored (default)")
    add("--tensor", type=positive, default=1, metavar="N", help="tensor parallel ranks of an engine (default: 1)")
    parser.set_defaults(set_defaults={"max_tokens": max_tokens, "samples": samples, "temperature": temperature})


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def given(args: argparse.Namespace, names: tuple[str, ...]) -> dict[str, Any]:
    """Options of these names that were given."""
    return {name: value for name in names if (value := getattr(args, name, None)) not in (None, {})}


def set_of(args: argparse.Namespace) -> Any:
    """The one set that a command line describes, as an EvaluationSet."""
    from pydantic import ValidationError

    from megatron_posttrain.evaluation.suite import EvaluationSet

    reward = {"name": args.reward or "math", "file": args.reward_file, "args": args.reward_args or {}}
    defaults = {name: x for name, x in args.set_defaults.items() if not (args.preset and name == "temperature")}
    values = {"data": args.data, "rewards": [reward], **defaults, **given(args, SET_OPTIONS)}
    try:
        return EvaluationSet.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        option = str(first["loc"][0]).replace("_", "-")
        raise UserError(f"--{option} {first['input']}: {first['msg'][:1].lower() + first['msg'][1:]}") from None


@dataclass(frozen=True)
class Job:
    """A checked command line, and what was learned while checking it."""

    tokenizer: Any
    tasks: list[Any]  # Task
    max_model_len: int
    dtype: Any  # torch's


def prepare(args: argparse.Namespace, sets: dict[str, Any], directory: Path = Path()) -> Job:
    """Raises UserError for whatever can be known before the engine is built."""
    from megatron_posttrain.checkpoint.hf import check_directory
    from megatron_posttrain.data.tokenize import load_tokenizer
    from megatron_posttrain.parallel.network import check_interfaces
    from megatron_posttrain.training.process import quiet_libraries
    from megatron_posttrain.training.resume import fingerprint_of_config, fingerprint_of_weights

    quiet_libraries()
    check_interfaces()
    _, architecture = check_directory(args.model, serving=True)
    tokenizer = load_tokenizer(args.model)
    weights = fingerprint_of_config(Path(args.model)) + fingerprint_of_weights(Path(args.model))
    tasks, lengths = [], []
    for name, one in sets.items():
        try:
            task = _task(args, name, one, directory, tokenizer, weights)
            lengths.append(_length(task, architecture.context_length))
        except UserError as error:
            raise UserError(f"set {name}: {error}" if len(sets) > 1 else str(error)) from None
        tasks.append(task)
    dtype = dtype_of(args)
    _check_engine(args, architecture, max(lengths), dtype.itemsize)
    return Job(tokenizer, tasks, max(lengths), dtype)


def start_engine(args: argparse.Namespace, job: Job) -> Any:
    from megatron_posttrain.parallel.groups import start_distributed
    from megatron_posttrain.platform.describe import refuse_unused_gpu
    from megatron_posttrain.rollout import RolloutEngine

    refuse_unused_gpu()
    start_distributed()
    return RolloutEngine(
        args.model, dtype=job.dtype, max_model_len=job.max_model_len, tensor=args.tensor, gpu_memory_utilization=0.9
    )


def _task(args: argparse.Namespace, name: str, one: Any, directory: Path, tokenizer: Any, weights: str) -> Any:
    from megatron_posttrain.config.schema import RolloutConfig
    from megatron_posttrain.data.dataset import PromptDataset
    from megatron_posttrain.evaluation.responses import Task
    from megatron_posttrain.rewards import load_rewards
    from megatron_posttrain.rollout.turns import load_turns
    from megatron_posttrain.training.limits import check_answers, rows_with_tools

    about = {"model": str(args.model), "data": str(directory / one.data), "graded_by": one.graded_by}
    if one.perplexity is not None:
        texts = one.texts(directory)
        return Task(
            [], [], one.sampling, texts=texts, name=name, about=about, settings=_settings(args, one, texts, weights)
        )
    rewards = load_rewards(one.rewards)
    rows = one.rows(directory)
    check_answers(rows, one.rewards)
    turns = load_turns(one.environment, RolloutConfig(), tokenizer)
    rows = rows_with_tools(rows, turns.tools)
    asked = PromptDataset(rows, tokenizer, sys.maxsize, omissions=args.omissions).prompts
    how = args.seed, args.save_every, turns, rows, (), name, about, _settings(args, one, asked, weights)
    return Task(asked, rewards, one.sampling, *how)


def _settings(args: argparse.Namespace, one: Any, asked: list[Any], weights: str) -> dict[str, Any]:
    from megatron_posttrain.data.files import content

    files = [spec.file for spec in (*one.rewards, one.environment) if spec is not None and spec.file]
    found = {
        "model": args.model, "weights": weights,
        "sampling": asdict(one.sampling), **one.model_dump(mode="json", include={"rewards", "environment"}),
        "files": [content(file) for file in files], "prompts": hashlib.sha256(repr(asked).encode()).hexdigest()[:16],
        "seed": args.seed, "dtype": args.dtype, "save_every": args.save_every,
    }  # fmt: skip
    return dict(json.loads(json.dumps(found)))  # as it comes back from a file


def _length(task: Any, context_length: int) -> int:
    """Tokens of the longest prompt with its response, or of a window of perplexity."""
    if task.texts:
        return min(task.sampling.max_tokens + 2, context_length)  # the token before it, and one that must be drawn
    longest = max(task.prompts, key=lambda prompt: len(prompt.token_ids))
    length = len(longest.token_ids) + task.sampling.max_tokens
    if length > context_length:
        raise UserError(
            f"--max-tokens {task.sampling.max_tokens}: with the {len(longest.token_ids)} tokens of the prompt at "
            f"{task.rows[longest.index].source} that is {length}; the model allows {context_length}"
        )
    return length


def dtype_of(args: argparse.Namespace) -> Any:
    import torch

    from megatron_posttrain.checkpoint.hf import HfReader

    stored = HfReader(args.model)
    named = {"fp32": torch.float32, "bf16": torch.bfloat16}
    kept = (stored.dtype(name) for name in stored.names())  # beside codes and shapes of quantised tensors
    return named.get(args.dtype) or next(dtype for dtype in kept if dtype.is_floating_point and dtype.itemsize > 1)


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
