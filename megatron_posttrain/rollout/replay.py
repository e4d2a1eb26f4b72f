"""Samples that another run has logged, in place of an engine's: an algorithm is looked at without generation."""

from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from megatron_posttrain.config.algorithms import GrpoConfig
from megatron_posttrain.data.dataset import Prompt
from megatron_posttrain.data.files import records
from megatron_posttrain.errors import UserError
from megatron_posttrain.models.architecture import Architecture
from megatron_posttrain.rewards.grading import Grade
from megatron_posttrain.rollout.samples import Samples

NEEDED = ("sample", "prompt_token_ids", "token_ids", "logprobs", "reward", "finish_reason")


def logged_file(directory: str | Path, step: int) -> Path:
    """Of step number `step`, from 1."""
    return Path(directory, f"step_{step:06d}.jsonl")


def read_logged(file: Path, config: GrpoConfig, arch: Architecture) -> Samples:
    """Rewards are as they were given. Raises UserError where it is not a step of such a run."""
    found: list[dict[str, Any]] = []
    for place, row in records(str(file)):
        if missing := [key for key in NEEDED if key not in row]:
            raise UserError(f"{place}: no '{missing[0]}', so it is no sample that a run of this version has logged")
        tokens = row["prompt_token_ids"] + row["token_ids"]
        if len(tokens) > config.data.sequence_length or max(tokens) >= arch.vocab_size:
            raise UserError(
                f"{place}: {len(tokens)} tokens up to number {max(tokens)}; allowed: data.sequence_length="
                f"{config.data.sequence_length} tokens of a vocabulary of {arch.vocab_size}"
            )
        found.append(row)
    size = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    if len(found) != size:
        raise UserError(
            f"{file}: {len(found)} samples; allowed: prompts_per_step x samples_per_prompt = {size}, or set these"
        )
    return _samples(sorted(found, key=lambda row: row["sample"]))


def _samples(rows: list[dict[str, Any]]) -> Samples:
    names = dict.fromkeys(name for row in rows for name in row["rewards"])
    share = -(-len(rows) // dist.get_world_size())
    drawn = range(len(rows))[dist.get_rank() * share :][:share]
    mine = [rows[k] for k in drawn]
    masks = [np.array(row.get("mask", [1] * len(row["token_ids"])), bool) for row in rows]
    return Samples(
        prompts=[Prompt(row["index"], row["prompt_token_ids"], row["answer"], {}, row["prompt"]) for row in rows],
        lengths=np.array([len(row["token_ids"]) for row in rows]),
        sampled=np.array([mask.sum() for mask in masks]),
        truncated=np.array([row["finish_reason"] == "length" for row in rows]),
        rewards=np.array([row["reward"] for row in rows], np.float64),
        rewards_by_name={name: np.array([row["rewards"].get(name, np.nan) for row in rows]) for name in names},
        masked=np.array([row.get("masked", False) for row in rows]),
        versions=np.array([row["version"] for row in rows]),
        drawn=drawn,
        token_ids=[np.array(row["token_ids"], np.int32) for row in mine],
        logprobs=[np.where(masks[k], np.array(rows[k]["logprobs"], np.float32), np.float32(np.nan)) for k in drawn],
        messages=[row.get("turns", []) for row in mine],
        texts=[row["response"] for row in mine],
        grades=[
            Grade(row["rewards"], row["reward"], row.get("masked", False), row.get("failures", {})) for row in mine
        ],
        logged={},
        ranks_per_replica=1,
        replica_of=np.arange(len(rows)) // share,
    )
