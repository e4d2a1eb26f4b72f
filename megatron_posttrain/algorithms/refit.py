"""The rollout engine of a run: made as its config says, given the trainer's weights, and proven to hold them."""

import time
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from megatron_posttrain.config.algorithms import DistillConfig, GrpoConfig
from megatron_posttrain.config.schema import Config
from megatron_posttrain.data.batch import Sequence as TokenSequence
from megatron_posttrain.data.dataset import Prompt
from megatron_posttrain.models.build import DTYPES
from megatron_posttrain.platform import platform
from megatron_posttrain.rollout.engine import RolloutEngine
from megatron_posttrain.rollout.refit import Refit, prove
from megatron_posttrain.rollout.routed_experts import choice_type
from megatron_posttrain.training.engine import Engine
from megatron_posttrain.training.export import export_adapter
from megatron_posttrain.training.prepare import Prepared
from megatron_posttrain.training.run import Run
from megatron_posttrain.training.sequences import sequence_logprobs

RlConfig = GrpoConfig | DistillConfig  # what draws samples
CANARY_PROMPTS = 4


class Refits:
    """A rollout engine and the trainer whose weights it gets.

    Collective: made once the trainer has what memory it needs; the run closes the engine.
    """

    rollout: RolloutEngine  # but where the engines are in ranks of their own

    def __init__(self, config: RlConfig, run: Run, engine: Engine) -> None:
        self.run, self.engine = run, engine
        self._make_room(config)
        if run.bridge is None:
            self.rollout = run.closing(make_engine(config, run.prepared))
        self._refit = Refit(getattr(self, "rollout", None), engine.exporter, run.bridge)

    def update(self, config: RlConfig, prompts: Sequence[Prompt], version: int) -> dict[str, float]:
        """Collective: the trainer's weights into the engine, and the proof on the first `prompts`; figures of both."""
        self._make_room(config)
        figures: dict[str, float] = {}
        if config.rollout.adapters == "ship":
            directory = adapter_directory(config)
            export_adapter(self.engine, self.run.prepared.model_path, directory)
            if self.run.bridge is None:
                self.rollout.ship(directory)
            else:
                self.run.bridge.tell(None)  # it is written
        else:
            self.engine.gather_weights()
            with platform().megatron():
                figures = self._refit.figures(self._refit.from_trainer(version))
        start = time.perf_counter()

        def own(sequences: list[list[int]]) -> list[Tensor]:
            whole = [TokenSequence(ids, [1] * len(ids)) for ids in sequences]
            return sequence_logprobs(self.engine, whole, token_budget(config), temperature=1.0)

        canaries, tolerance = [p.token_ids for p in prompts[:CANARY_PROMPTS]], config.rollout.proof_tolerance
        prove(self._refit.engine, canaries, own, tolerance, self.run.bridge)
        return figures | {"proof_seconds": time.perf_counter() - start + self._refit.digest_seconds}

    def _make_room(self, config: RlConfig) -> None:
        """Before vLLM asks for its share of the memory."""
        for trained in (self.engine, *self.run.checkpoints.beside.values()) if config.rollout.offload else ():
            trained.offload()


def make_engine(config: RlConfig, prepared: Prepared) -> RolloutEngine:
    """Collective: as the config says."""
    rollout, shipped = config.rollout, config.rollout.adapters == "ship"
    replays = isinstance(config, GrpoConfig) and config.algorithm.routing_replay == "rollout"
    return RolloutEngine(
        str(prepared.model_path),
        dtype=DTYPES[config.precision.dtype],
        tensor=rollout.tensor,
        expert=rollout.expert,
        max_model_len=config.data.sequence_length,
        kv_cache_bytes=None if rollout.kv_cache_gib is None else int(rollout.kv_cache_gib * 2**30),
        max_num_seqs=rollout.max_num_seqs,
        seed=config.training.seed,
        gpu_memory_utilization=rollout.gpu_memory_fraction,
        quantization=rollout.quantization,
        lora_rank=config.lora.rank if shipped and config.lora else None,
        load_weights=shipped,
        choices=choice_type(prepared.arch) if replays else None,
    )


def adapter_directory(config: Config) -> Path:
    """Of the adapter that engines read."""
    return config.output_dir / "rollouts" / "adapter"


def token_budget(config: Config) -> int:
    """Tokens of a micro-batch; samples share it."""
    return config.data.sequence_length * config.training.micro_batch_size
