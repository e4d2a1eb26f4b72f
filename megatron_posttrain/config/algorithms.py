"""The algorithms: for each its config and one row of the table that commands, `doctor`, `plan` and benchmarks read.

No torch here: `--help` and `plan` start without it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat

from megatron_posttrain.config.schema import Config, RewardConfig, RolloutConfig, Section


class SftAlgorithm(Section):
    pass


class GrpoAlgorithm(Section):
    clip_low: PositiveFloat = Field(0.2, description="ratio is clipped at 1 - clip_low")
    clip_high: PositiveFloat = Field(0.2, description="ratio is clipped at 1 + clip_high")
    dual_clip: PositiveFloat | None = Field(None, description="lower bound c * A for negative advantages")
    ratio_level: Literal["token", "sequence"] = Field("token", description="sequence: GSPO")
    aggregation: Literal["token", "sequence", "constant"] = "token"
    normalize_std: bool = Field(True, description="divide advantages by the group's standard deviation")
    leave_one_out: bool = Field(False, description="baseline from the group's other samples")
    importance_cap: PositiveFloat | None = Field(None, description="truncated importance sampling cap; null: off")
    kl_coefficient: NonNegativeFloat = Field(0.0, description="weight of the KL to the starting model")
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"


class SftConfig(Config):
    command = "sft"
    algorithm: SftAlgorithm = Field(default_factory=SftAlgorithm)


class ScoreConfig(SftConfig):
    command = "score"
    ignored = dict.fromkeys(
        ("optimizer", "training.steps", "training.epochs", "checkpoint", "data.validation", "data.overlong"),
        "`score` does not train",
    )


class GrpoConfig(Config):
    command = "grpo"
    ignored: ClassVar[dict[str, str]] = {
        "data.validation": "held-out problems are graded by `evaluate`",
        "data.packing": "samples always share micro-batches",
        "data.overlong": "prompts that leave no room for rollout.max_tokens are dropped, responses end there",
    }
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    rewards: list[RewardConfig] = Field(
        default_factory=lambda: [RewardConfig(name="math")],
        description="the sum of weight x reward; `file`: Python file that defines it with @reward(name)",
    )
    algorithm: GrpoAlgorithm = Field(default_factory=GrpoAlgorithm)

    @property
    def rows_per_step(self) -> int:
        return self.rollout.prompts_per_step

    def problems(self, world_size: int) -> Iterator[str]:
        rollout, length, update = self.rollout, self.data.sequence_length, self.training.global_batch_size
        samples = rollout.prompts_per_step * rollout.samples_per_prompt
        if samples % update:
            yield (
                f"training.global_batch_size={update} does not divide the samples of a step, "
                f"rollout.prompts_per_step x samples_per_prompt = {samples}; for one update a step set it to {samples}"
            )
        if rollout.samples_per_prompt < 2:
            yield (
                "rollout.samples_per_prompt=1: a sample is compared with the others of its prompt, so nothing would be "
                "learned; allowed: 2 or more"
            )
        if world_size % rollout.tensor:
            yield f"rollout.tensor={rollout.tensor} does not divide the {world_size} ranks"
        if rollout.max_tokens >= length:
            yield (
                f"data.sequence_length={length} leaves no room for a prompt beside "
                f"rollout.max_tokens={rollout.max_tokens}"
            )


@dataclass(frozen=True)
class Algorithm:
    """A training command.

    Args:
        function: `module:function`; takes the config, returns an exit status.
        help: one line.
        rows: what `data.train` holds.
        rollouts: whether every trainer rank holds a rank of a vLLM engine.
    """

    config: type[Config]
    function: str
    help: str
    rows: Literal["conversations", "prompts", "any"] = "conversations"
    rollouts: bool = False

    @property
    def name(self) -> str:
        return self.config.command

    def load(self) -> Callable[[Any], int]:
        """The function; imports its module, and torch with it."""
        module, name = self.function.split(":")
        return getattr(importlib.import_module(module), name)


ALGORITHMS = {
    row.name: row
    for row in (
        Algorithm(SftConfig, "megatron_posttrain.algorithms.sft:sft", "supervised fine-tuning"),
        Algorithm(
            GrpoConfig,
            "megatron_posttrain.algorithms.grpo:grpo",
            "GRPO with vLLM in every trainer rank",
            rows="prompts",
            rollouts=True,
        ),
        Algorithm(
            ScoreConfig,
            "megatron_posttrain.algorithms.score:score",
            "log-probabilities of the tokens of conversations",
            rows="any",
        ),
    )
}
