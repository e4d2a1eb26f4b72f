"""The rollout engine of a run: made as its config says, given the trainer's weights, and proven to hold them."""

import time
from collections.abc import Sequence
from typing import Self

from torch import Tensor

from megatron_posttrain.config.algorithms import DistillConfig, GrpoConfig
from megatron_posttrain.config.schema import Config
from megatron_posttrain.data.batch import Sequence as TokenSequence
from megatron_posttrain.data.dataset import Prompt
from megatron_posttrain.models.build import DTYPES
from megatron_posttrain.parallel.bridge import Bridge
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
    """A rollout engine and the trainer whose weights it gets: the models `trained`, the policy first. Over a bridge a
    rank has one of the two.

    Collective: made once the trainer has what memory it needs.
    """

    rollout: RolloutEngine  # not where rollout ranks have it

    def __init__(self, config: RlConfig, prepared: Prepared, bridge: Bridge, trained: Sequence[Engine] = ()) -> None:
        self.prepared, self.bridge, self.trained = prepared, bridge, trained
        self._make_room(config)
        rollout, shipped = config.rollout, config.rollout.adapters == "ship"
        replays = isinstance(config, GrpoConfig) and config.algorithm.routing_replay == "rollout"
        if bridge.group is None or bridge.generates:
            self.rollout = RolloutEngine(
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
                fp32_head=config.precision.head == "fp32",
                choices=choice_type(prepared.arch) if replays else None,
            )
        exporter = trained[0].exporter if trained else None
        self._refit = Refit(getattr(self, "rollout", None), exporter, bridge)
        self._proven = False

    @classmethod
    def of(cls, config: RlConfig, run: Run, engine: Engine) -> Self:
        """Of a trainer's rank; the run closes it."""
        return run.closing(cls(config, run.prepared, run.bridge, [engine, *run.checkpoints.beside.values()]))

    def update(self, config: RlConfig, prompts: Sequence[Prompt], version: int) -> dict[str, float]:
        """Collective: the trainer's weights into the engine, and the proof on the first `prompts`; figures of both."""
        self._make_room(config)
        figures: dict[str, float] = {}
        policy, engine = self.trained[0] if self.trained else None, self._refit.engine
        if config.rollout.adapters == "ship":
            directory = config.output_dir / "rollouts" / "adapter"
            if policy is not None:
                export_adapter(policy, self.prepared.model_path, directory)
            self.bridge.tell(None)  # it is written
            if engine is not None:
                engine.ship(directory, version)
        else:
            if policy is not None:
                policy.gather_weights()
            figures = self._refit.figures(self._refit.from_trainer(version))
        start = time.perf_counter()

        def own(sequences: list[list[int]]) -> list[Tensor]:
            if policy is None:
                return []
            whole = [TokenSequence(ids, [1] * len(ids)) for ids in sequences]
            return sequence_logprobs(policy, whole, token_budget(config), temperature=1.0)

        if not self._proven or version % config.rollout.proof_every == 0:
            canaries = [prompt.token_ids for prompt in prompts[:CANARY_PROMPTS]]
            prove(engine, canaries, own, config.rollout.proof_tolerance, self.bridge)
            self._proven = True
        return figures | {"proof_seconds": time.perf_counter() - start + self._refit.digest_seconds}

    def close(self) -> None:
        if self._refit.engine is not None:
            self._refit.engine.close()

    def _make_room(self, config: RlConfig) -> None:
        """Before vLLM asks for its share of the memory."""
        for trained in self.trained if config.rollout.offload else ():
            trained.offload()


def token_budget(config: Config) -> int:
    """Tokens of a micro-batch; samples share it."""
    return config.data.sequence_length * config.training.micro_batch_size
