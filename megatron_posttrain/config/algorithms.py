"""The algorithms: for each its config and one row of the table that commands, `doctor`, `plan` and benchmarks read.

No torch here: `--help` and `plan` start without it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from megatron_posttrain.config.schema import (
    Config,
    EnvironmentConfig,
    Fraction,
    RewardConfig,
    RolloutConfig,
    SandboxConfig,
    Section,
)


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


PreferenceLoss = Literal["sigmoid", "robust", "ipo", "apo_zero", "apo_down", "simpo", "orpo", "kto"]
WITHOUT_REFERENCE = ("simpo", "orpo")


def preference_problems(
    loss: str, label_smoothing: float, length_normalized: bool, gamma: float, sft_weight: float = 0.0
) -> Iterator[str]:
    """Options that a preference loss would ignore, or cannot have; one reason each."""
    if loss not in get_args(PreferenceLoss):
        yield f"loss must be one of {', '.join(get_args(PreferenceLoss))}, found {loss!r}"
    if label_smoothing and loss not in ("sigmoid", "robust"):
        yield f"label_smoothing={label_smoothing} has no effect on {loss}; allowed: 0, or loss sigmoid or robust"
    if loss == "robust" and not label_smoothing < 0.5:
        yield f"label_smoothing={label_smoothing}: robust needs less than 0.5"
    if gamma and loss != "simpo":
        yield f"gamma={gamma} has no effect on {loss}; allowed: 0, or loss simpo"
    if length_normalized and loss == "kto":
        yield "length_normalized has no effect on kto; allowed: false"
    if sft_weight and loss in ("orpo", "kto"):
        why = "has the chosen answer's NLL already" if loss == "orpo" else "has no chosen answer"
        yield f"sft_weight={sft_weight}: {loss} {why}; allowed: 0"


class DpoAlgorithm(Section):
    loss: PreferenceLoss = Field("sigmoid", description="kto reads labelled rows, the others pairs")
    beta: PositiveFloat = Field(0.1, description="strength of the pull to the reference; orpo: weight of the odds")
    label_smoothing: Fraction = Field(0.0, description="share of preferences that are wrong; sigmoid and robust")
    length_normalized: bool = Field(False, description="log-ratios over the answer's tokens")
    sft_weight: NonNegativeFloat = Field(0.0, description="of the chosen answer's mean -log p")
    gamma: NonNegativeFloat = Field(0.0, description="simpo: the margin that is asked for")
    reference_cache: str | None = Field(
        None, description="directory of the reference's log-probs, for several runs; null: OUTPUT/reference"
    )


class RewardModelAlgorithm(Section):
    center: NonNegativeFloat = Field(0.0, description="weight of the squared sum of a pair's rewards")


class DistillAlgorithm(Section):
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = Field(
        "forward_kl", description="forward_kl: KL(teacher || student)"
    )
    beta: Fraction = Field(0.5, description="jsd: the teacher's share of the mixture")
    temperature: PositiveFloat = Field(1.0, description="of both distributions")
    top_k: PositiveInt | None = Field(
        None, description="the teacher's k likeliest tokens, and all others as one; null: the whole vocabulary"
    )
    student_fraction: Fraction = Field(
        0.0, description="of rows that the student samples itself; 0 is what is supported"
    )


class TeacherConfig(Section):
    path: str = Field(description="Hugging Face directory or hub id in the local cache")


class SftConfig(Config):
    command = "sft"
    algorithm: SftAlgorithm = Field(default_factory=SftAlgorithm)


class ScoreConfig(SftConfig):
    command = "score"
    ignored = dict.fromkeys(
        ("optimizer", "lora", "training.steps", "training.epochs", "checkpoint", "data.validation", "data.overlong"),
        "`score` does not train",
    )


class DpoConfig(Config):
    command = "dpo"
    algorithm: DpoAlgorithm = Field(default_factory=DpoAlgorithm)

    def problems(self, world_size: int) -> Iterator[str]:
        a = self.algorithm
        found = preference_problems(a.loss, a.label_smoothing, a.length_normalized, a.gamma, a.sft_weight)
        yield from (f"algorithm.{problem}" for problem in found)
        if a.reference_cache is not None and a.loss in WITHOUT_REFERENCE:
            yield f"algorithm.reference_cache has no effect: {a.loss} has no reference; allowed: null"


class RewardModelConfig(Config):
    command = "reward-model"
    algorithm: RewardModelAlgorithm = Field(default_factory=RewardModelAlgorithm)


class DistillConfig(Config):
    command = "distill"
    teacher: TeacherConfig = Field(description="a frozen model with the student's tokenizer, in its layout")
    algorithm: DistillAlgorithm = Field(default_factory=DistillAlgorithm)

    def problems(self, world_size: int) -> Iterator[str]:
        a = self.algorithm
        if a.divergence == "jsd" and not 0 < a.beta < 1:
            yield f"algorithm.beta={a.beta} makes jsd zero; allowed: above 0 and below 1, or forward_kl or reverse_kl"
        if a.student_fraction:
            yield f"algorithm.student_fraction={a.student_fraction}: no samples of the student yet; allowed: 0"


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
    environment: EnvironmentConfig | None = Field(None, description="what answers the model's turns; null: one turn")
    sandbox: SandboxConfig = Field(default_factory=SandboxConfig)
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
        if rollout.thinking_tokens is not None and rollout.thinking_tokens >= rollout.max_tokens:
            yield (
                f"rollout.thinking_tokens={rollout.thinking_tokens} has no effect beside "
                f"rollout.max_tokens={rollout.max_tokens}; allowed: fewer, or null"
            )
        if self.environment is None and any(r.name == "environment" and r.file is None for r in self.rewards):
            yield "rewards: 'environment' is what an environment gives, and there is none; set `environment`"
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
    rows: Literal["conversations", "prompts", "preferences", "any"] = "conversations"
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
            DpoConfig,
            "megatron_posttrain.algorithms.dpo:dpo",
            "preferences: DPO and its relatives, KTO",
            rows="preferences",
        ),
        Algorithm(
            RewardModelConfig,
            "megatron_posttrain.algorithms.reward_model:reward_model",
            "a scalar reward from pairs",
            rows="preferences",
        ),
        Algorithm(
            DistillConfig, "megatron_posttrain.algorithms.distill:distill", "a student learns a teacher's distributions"
        ),
        Algorithm(
            ScoreConfig,
            "megatron_posttrain.algorithms.score:score",
            "log-probabilities of the tokens of conversations",
            rows="any",
        ),
    )
}
