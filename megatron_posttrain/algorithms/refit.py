"""The rollout engine of a run: made as its config says, given the trainer's weights, and proven to hold them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from megatron_posttrain.config.algorithms import DistillConfig, GrpoConfig
from megatron_posttrain.config.schema import Config
from megatron_posttrain.data.batch import Sequence as TokenSequence
from megatron_posttrain.data.dataset import Prompt
from megatron_posttrain.models.build import DTYPES
from megatron_posttrain.rollout.engine import RolloutEngine
from megatron_posttrain.rollout.refit import Refit, prove
from megatron_posttrain.rollout.routed_experts import choice_type
from megatron_posttrain.training.engine import Engine
from megatron_posttrain.training.export import export_adapter, full_tensors
from megatron_posttrain.training.run import Run
from megatron_posttrain.training.sequences import sequence_logprobs

RlConfig = GrpoConfig | DistillConfig  # what draws samples
CANARY_PROMPTS = 4


def start_engine(config: RlConfig, run: Run, engine: Engine) -> RolloutEngine:
    """Collective: once the trainer, `engine`, has what memory it needs. The run closes it."""
    make_room(config, run, engine)
    cache, shipped = config.rollout.kv_cache_gib, config.rollout.adapters == "ship"
    replays = isinstance(config, GrpoConfig) and config.algorithm.routing_replay == "rollout"
    rollout = RolloutEngine(
        str(run.prepared.model_path),
        dtype=DTYPES[config.precision.dtype],
        tensor=config.rollout.tensor,
        max_model_len=config.data.sequence_length,
        kv_cache_bytes=None if cache is None else int(cache * 2**30),
        seed=config.training.seed,
        gpu_memory_utilization=config.rollout.gpu_memory_fraction,
        quantization=config.rollout.quantization,
        lora_rank=config.lora.rank if shipped and config.lora else None,
        load_weights=shipped,
        choices=choice_type(run.prepared.arch) if replays else None,
    )
    return run.closing(rollout)


def refit(
    run: Run, rollout: RolloutEngine, engine: Engine, config: RlConfig, prompts: Sequence[Prompt], step: int
) -> None:
    """Collective: the trainer's weights into the rollout engine, and the proof on the first `prompts`."""
    make_room(config, run, engine)
    if config.rollout.adapters == "ship":
        directory = run.directory / "rollouts" / "adapter"
        export_adapter(engine, run.prepared.model_path, directory)
        rollout.ship(directory)
    else:
        Refit(rollout).update(full_tensors(engine), step)
    own = partial(_canary_logprobs, engine, token_budget(config))
    prove(rollout, [p.token_ids for p in prompts[:CANARY_PROMPTS]], own, config.rollout.proof_tolerance)


def token_budget(config: Config) -> int:
    """Tokens of a micro-batch; samples share it."""
    return config.data.sequence_length * config.training.micro_batch_size


def make_room(config: RlConfig, run: Run, engine: Engine) -> None:
    """Before vLLM asks for its share of the memory."""
    for trained in (engine, *run.checkpoints.beside.values()) if config.rollout.offload else ():
        trained.offload()


def _canary_logprobs(engine: Engine, budget: int, sequences: list[list[int]]) -> list[torch.Tensor]:
    whole = [TokenSequence(ids, [1] * len(ids)) for ids in sequences]
    return sequence_logprobs(engine, whole, budget, temperature=1.0)
