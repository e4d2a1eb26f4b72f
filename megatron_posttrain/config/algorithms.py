"""The algorithms: for each its config and one row of the table that commands, `doctor`, `plan` and benchmarks read. No
torch here: `--help` and `plan` start without it."""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from megatron_posttrain.config.presets import PRESETS
from megatron_posttrain.config.schema import (
    Config,
    EnvironmentConfig,
    Fraction,
    RewardConfig,
    RolloutConfig,
    SandboxConfig,
    Scheduled,
    Section,
    key,
)


class SftAlgorithm(Section):
    z_loss: NonNegativeFloat = key(0.0, "weight of the squared log of the softmax's normaliser: 1e-4")


Band = tuple[PositiveFloat, PositiveFloat]


class PolicyAlgorithm(Section):
    objective: Literal["clip", "cispo"] = key("clip", "cispo: capped ratio without gradient")
    clip_low: Scheduled[PositiveFloat] = key(0.2, "ratio is clipped at 1 - clip_low")
    clip_high: Scheduled[PositiveFloat] = key(0.2, "ratio is clipped at 1 + clip_high")
    dual_clip: PositiveFloat | None = key(None, "lower bound c * A for negative advantages")
    ratio_level: Literal["token", "sequence"] = key("token", "sequence: GSPO")
    aggregation: Literal["token", "sequence", "constant"] = "token"
    mask_truncated: bool = key(False, "responses that rollout.max_tokens cut off do not train")
    importance_cap: PositiveFloat | None = key(None, "truncated importance sampling: largest ratio trainer / engine")
    importance_level: Literal["token", "sequence"] = key("token", "whose ratio importance_cap caps")
    token_band: Band | None = key(None, "tokens whose such ratio is outside do not train: [0.5, 5.0]")
    sequence_band: Band | None = key(None, "as token_band, of a response's geometric mean ratio")
    stop_outside: Fraction | None = key(
        None, "share of tokens outside token_band (null: [0.5, 5.0]) above which the run ends; null: never"
    )
    routing_replay: Literal["none", "rollout", "old"] = key(
        "none",
        "experts that training sends tokens to again: those that vLLM chose, or the policy that "
        "the first of several updates begins with; their weights stay the router's",
    )
    kl_coefficient: Scheduled[NonNegativeFloat] = key(0.0, "weight of the KL to the reference")
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    kl_in: Literal["loss", "reward"] = "loss"
    reference_every: PositiveInt | None = key(None, "steps after which the policy becomes the reference; null: never")
    reset_optimizer: bool = key(False, "the optimizer's moments begin anew then, too (ProRL, arXiv 2505.24864)")
    entropy_coefficient: Scheduled[NonNegativeFloat] = key(
        0.0, "weight of the entropy bonus; with entropy_target: by how much a step moves the weight"
    )
    entropy_target: PositiveFloat | None = key(None, "nats; below it the bonus grows from 0, above it shrinks")

    @property
    def needs_reference(self) -> bool:
        return self.at(None).kl_coefficient > 0

    def problems(self) -> Iterator[str]:
        """Keys that these values make idle, or impossible; one reason each."""
        cispo, kl = self.objective == "cispo", self.needs_reference
        if self.dual_clip is not None and (cispo or self.dual_clip <= 1):
            yield f"dual_clip={self.dual_clip}: allowed: null, or more than 1 with objective clip"
        if cispo and self.clip_low != type(self).model_fields["clip_low"].default:
            yield f"clip_low={self.clip_low} has no effect on objective cispo; allowed: leave it out"
        if self.importance_level == "sequence" and self.importance_cap is None:
            yield "importance_level=sequence has no effect without importance_cap"
        for name, band in (("token_band", self.token_band), ("sequence_band", self.sequence_band)):
            if band is not None and not band[0] < 1 < band[1]:
                yield f"{name}={list(band)}: allowed: [below 1, above 1]"
        if not kl and (self.kl_in == "reward" or self.reference_every is not None):
            yield "kl_in and reference_every have no effect without kl_coefficient"
        if self.reset_optimizer and self.reference_every is None:
            yield "reset_optimizer has no effect without reference_every"
        if self.entropy_target is not None and not self.at(None).entropy_coefficient:
            yield "entropy_target has no effect without entropy_coefficient, by which a step moves the bonus (0.005)"


class GrpoAlgorithm(PolicyAlgorithm):
    preset: Literal["grpo", "dapo", "dr_grpo", "gspo", "cispo", "rloo", "reinforce_plus_plus"] | None = key(
        None, "published values for what the config leaves out; --print-config shows them"
    )
    baseline: Literal["group", "batch"] = key("group", "subtracted mean reward: a prompt's, or of the step's tokens")
    leave_one_out: bool = key(False, "baseline from the group's other samples")
    normalize_std: bool = key(True, "divide advantages by their standard deviation")
    advantage_scale: Literal["group", "batch"] = key("group", "whose standard deviation")
    dynamic_sampling: PositiveInt | None = key(
        None, "prompts of equal rewards are replaced by others, of at most so many batches; null: they stay"
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        return PRESETS.get(str(values.get("preset")), {}) | values if isinstance(values, dict) else values

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.baseline == "batch" and (
            self.leave_one_out or not self.normalize_std or self.advantage_scale == "group" or self.dynamic_sampling
        ):
            others = "normalize_std=true, leave_one_out=false and dynamic_sampling=null"
            yield f"baseline=batch goes with advantage_scale=batch, {others}"
        if self.advantage_scale == "batch" and not self.normalize_std:
            yield "advantage_scale=batch has no effect with normalize_std=false"


class PpoAlgorithm(PolicyAlgorithm):
    gamma: Fraction = key(1.0, "discount of a later token's reward")
    lam: Fraction = key(0.95, "of generalized advantage estimation", alias="lambda")
    value_clip: PositiveFloat | None = key(0.2, "largest move of a value in the critic's loss; null: not clipped")


class CriticConfig(Section):
    path: str | None = key(None, "Hugging Face directory, also of a reward model; null: the policy's")
    lr: PositiveFloat = key(1e-5, "peak learning rate, on the policy's schedule")
    warmup_steps: NonNegativeInt = key(0, "first steps, in which the policy stays as it is")


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
    loss: PreferenceLoss = key("sigmoid", "kto reads labelled rows, the others pairs")
    beta: PositiveFloat = key(0.1, "strength of the pull to the reference; orpo: weight of the odds")
    label_smoothing: Fraction = key(0.0, "share of preferences that are wrong; sigmoid and robust")
    length_normalized: bool = key(False, "log-ratios over the answer's tokens")
    sft_weight: NonNegativeFloat = key(0.0, "of the chosen answer's mean -log p")
    gamma: NonNegativeFloat = key(0.0, "simpo: the margin that is asked for")
    reference_cache: str | None = key(None, "directory of the reference's log-probs; null: OUTPUT/reference")


class RewardModelAlgorithm(Section):
    center: NonNegativeFloat = key(0.0, "weight of the squared sum of a pair's rewards")


class DistillAlgorithm(Section):
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = key("forward_kl", "forward_kl: KL(teacher || student)")
    beta: Fraction = key(0.5, "jsd: the teacher's share of the mixture")
    temperature: PositiveFloat = key(1.0, "of both distributions")
    top_k: PositiveInt | None = key(None, "the teacher's k likeliest tokens, and all others as one; null: all")
    student_fraction: Fraction = key(0.0, "of conversations, whose last turn the student answers itself")
    estimator: Literal["exact", "policy_gradient"] = key(
        "exact", "policy_gradient: reverse KL from the sampled tokens' log-probs alone, as an advantage"
    )


class TeacherConfig(Section):
    path: str = Field(description="Hugging Face directory or hub id in the local cache")
    offload: bool = key(False, "weights in host memory but while it looks at a step's rows")
    cache: str | None = key(None, "directory of its top_k tokens, 8 x top_k bytes a token; read where it has all")


CONVERSATIONS_ONLY = dict.fromkeys(("data.train_on", "data.cache"), "only sft and distill choose and keep tokens")


class SftConfig(Config):
    command = "sft"
    mixes = True
    algorithm: SftAlgorithm = Field(default_factory=SftAlgorithm)


class ScoreConfig(SftConfig):
    command = "score"
    mixes = False
    ignored = CONVERSATIONS_ONLY | dict.fromkeys(
        (
            *("optimizer", "lora", "training.steps", "training.epochs", "training.skip_not_finite", "training.ema"),
            *("checkpoint", "data.validation", "data.overlong", "logging.profile", "logging.wandb", "logging.mlflow"),
            "algorithm",
        ),
        "`score` does not train",
    )


class DpoConfig(Config):
    command = "dpo"
    ignored = CONVERSATIONS_ONLY
    algorithm: DpoAlgorithm = Field(default_factory=DpoAlgorithm)

    def problems(self, world_size: int) -> Iterator[str]:
        a = self.algorithm
        found = preference_problems(a.loss, a.label_smoothing, a.length_normalized, a.gamma, a.sft_weight)
        yield from (f"algorithm.{problem}" for problem in found)
        if a.reference_cache is not None and a.loss in WITHOUT_REFERENCE:
            yield f"algorithm.reference_cache has no effect: {a.loss} has no reference; allowed: null"


class RewardModelConfig(Config):
    command = "reward-model"
    ignored = CONVERSATIONS_ONLY
    algorithm: RewardModelAlgorithm = Field(default_factory=RewardModelAlgorithm)


def engine_key_problems(rollout: RolloutConfig, length: int, world_size: int) -> Iterator[str]:
    if (rollout.ranks or world_size) % rollout.tensor:
        ranks = f"rollout.ranks={rollout.ranks}" if rollout.ranks else f"the {world_size} ranks"
        yield f"rollout.tensor={rollout.tensor} does not divide {ranks}"
    if rollout.max_tokens >= length:
        room = f"no room for a prompt beside rollout.max_tokens={rollout.max_tokens}"
        yield f"data.sequence_length={length} leaves {room}"


class DistillConfig(Config):
    command = "distill"
    mixes = True
    teacher: TeacherConfig = Field(description="a frozen model with the student's tokenizer, in its layout")
    rollout: RolloutConfig = Field(default_factory=RolloutConfig, description="with algorithm.student_fraction")
    algorithm: DistillAlgorithm = Field(default_factory=DistillAlgorithm)
    ignored = dict.fromkeys(
        ("rollout.prompts_per_step", "rollout.samples_per_prompt", "rollout.thinking_tokens", "rollout.thinking_stop",
         "rollout.validation_samples", "rollout.token_figures", "rollout.replay"),
        "the student answers the batch's conversations once, and the teacher grades that",
    ) | {"rollout.ranks": "the student answers in every trainer rank"}  # fmt: skip

    @property
    def samples(self) -> bool:
        return self.algorithm.student_fraction > 0

    def problems(self, world_size: int) -> Iterator[str]:
        a, rollout = self.algorithm, self.rollout.at(None)
        if a.divergence == "jsd" and not 0 < a.beta < 1:
            yield f"algorithm.beta={a.beta} makes jsd zero; allowed: above 0 and below 1, or forward_kl or reverse_kl"
        if self.teacher.cache is not None and (a.top_k is None or self.samples):
            yield "teacher.cache keeps top_k tokens of rows; allowed: null, or algorithm.top_k and student_fraction=0"
        if self.samples:
            yield from engine_key_problems(rollout, self.data.sequence_length, world_size)
            if self.data.train_on == "everything":
                yield "data.train_on=everything leaves no prompt that algorithm.student_fraction could answer"
        elif self.rollout != RolloutConfig():
            yield "rollout has no effect without algorithm.student_fraction; leave it out"
        if a.estimator == "policy_gradient":
            needed = {"student_fraction": 1.0, "divergence": "reverse_kl", "top_k": None}
            if self.rollout.temperature != a.temperature:  # samples of what it trains
                needed["temperature"] = self.rollout.temperature
            for name, value in needed.items():
                if getattr(a, name) != value:
                    yield f"algorithm.{name}={getattr(a, name)}: estimator=policy_gradient needs {name}={value}"


class CurriculumConfig(Section):
    solved: Fraction = key(0.9, "running pass rate (reward above 0.5) from which a prompt is set aside")
    hopeless: Fraction = key(0.0, "pass rate down to which it is set aside")
    revisit: int = key(3, "epochs after which it is asked again", ge=2)


class GrpoConfig(Config):
    command = "grpo"
    ignored: ClassVar[dict[str, str]] = CONVERSATIONS_ONLY | {
        "data.packing": "samples always share micro-batches",
        "data.overlong": "prompts that leave no room for rollout.max_tokens are dropped, responses end there",
    }
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    rewards: list[RewardConfig] = Field(
        default_factory=lambda: [RewardConfig(name="math")],
        description="the sum of weight x reward; `file`: Python file that defines it with @reward(name)",
    )
    environment: EnvironmentConfig | None = key(None, "what answers the model's turns; null: one turn")
    curriculum: CurriculumConfig | None = key(None, "sets prompts aside that are nearly always or never solved")
    sandbox: SandboxConfig = Field(default_factory=SandboxConfig)
    algorithm: GrpoAlgorithm = Field(default_factory=GrpoAlgorithm)

    @property
    def samples(self) -> bool:
        return True

    @property
    def rollout_ranks(self) -> int:
        return self.rollout.ranks

    @property
    def rows_per_step(self) -> int:
        rollout = self.rollout
        return rollout.prompts_per_step + (0 if rollout.partial else rollout.oversample)

    @property
    def stale(self) -> bool:
        """Whether samples may be of older weights than those that they train."""
        return self.rollout.ahead > 0 or self.rollout.partial

    @property
    def recorded(self) -> bool:
        """Whether the old policy is what drew a sample, by the log-probs that were recorded: of stale samples, unless
        the algorithm corrects for the difference to them."""
        a = self.algorithm
        return self.stale and (a.importance_cap, a.token_band, a.sequence_band) == (None, None, None)

    def problems(self, world_size: int) -> Iterator[str]:
        rollout, length, update = self.rollout.at(None), self.data.sequence_length, self.training.global_batch_size
        samples, replay = rollout.prompts_per_step * rollout.samples_per_prompt, rollout.replay
        if samples % update:
            yield (
                f"training.global_batch_size={update} does not divide the samples of a step, "
                f"rollout.prompts_per_step x samples_per_prompt = {samples}; for one update a step set it to {samples}"
            )
        yield from (f"algorithm.{problem}" for problem in self.algorithm.problems())
        if samples == update and self.algorithm.routing_replay == "old":
            yield "algorithm.routing_replay=old has no effect with one update a step; allowed: none, rollout"
        if rollout.samples_per_prompt < 2 and getattr(self.algorithm, "baseline", None) == "group":
            yield "rollout.samples_per_prompt=1: a sample is compared with others of its prompt; allowed: 2 or more"
        yield from engine_key_problems(rollout, length, world_size)
        if rollout.ranks and (replay is not None or rollout.offload):
            idle = "rollout.offload: trainers share no GPU with vLLM" if replay is None else "rollout.replay: no engine"
            yield f"rollout.ranks={rollout.ranks} with {idle}; allowed: one of them"
        if rollout.in_flight and not (rollout.ranks and rollout.ahead):
            yield "rollout.in_flight: nothing is drawn while weights change; needs rollout.ranks and rollout.ahead"
        if rollout.validation_samples > 1 and self.data.validation is None:
            yield f"rollout.validation_samples={rollout.validation_samples} needs data.validation"
        if replay is not None and self.data.validation is not None:
            yield "rollout.replay leaves no engine to answer data.validation; allowed: one of them"
        if replay is not None and self.algorithm.routing_replay == "rollout":
            yield "rollout.replay: logged samples have no experts; allowed: algorithm.routing_replay of none or old"
        if rollout.thinking_tokens is not None and rollout.thinking_tokens >= rollout.max_tokens:
            beside = f"beside rollout.max_tokens={rollout.max_tokens}; allowed: fewer, or null"
            yield f"rollout.thinking_tokens={rollout.thinking_tokens} has no effect {beside}"
        yield from self._cut_off_problems()
        yield from self._reward_problems()

    def _cut_off_problems(self) -> Iterator[str]:
        extra, prompts, partial = self.rollout.oversample, self.rollout.prompts_per_step, self.rollout.partial
        if extra and getattr(self.algorithm, "dynamic_sampling", None):
            yield f"rollout.oversample={extra} cuts off what algorithm.dynamic_sampling counts; unset one of them"
        if self.rollout.replay is not None and (extra or self.curriculum is not None):
            yield "rollout.replay: logged samples are not drawn; rollout.oversample and curriculum have no effect"
        if self.recorded and self.algorithm.routing_replay == "old":
            yield "algorithm.routing_replay=old: no pass records what drew stale samples; allowed: none, rollout"
        if partial and not 0 < extra <= prompts:
            allowed = f"1 to prompts_per_step={prompts}, for the next step to complete, or partial=false"
            yield f"rollout.partial with rollout.oversample={extra}; allowed: {allowed}"
        if partial and self.environment is not None:
            yield "rollout.partial: the state of an environment is not carried on; allowed: false"

    def _reward_problems(self) -> Iterator[str]:
        if self.environment is None and any(r.name == "environment" and r.file is None for r in self.rewards):
            yield "rewards: 'environment' is what an environment gives, and there is none; set `environment`"
        sampling = getattr(self.algorithm, "dynamic_sampling", None)
        for name, value in {"algorithm.dynamic_sampling": sampling, "curriculum": self.curriculum}.items():
            if value is not None and any(r.name == "reward_model" for r in self.rewards):
                yield f"{name} looks at rewards before a reward_model gives its own; allowed: null"


class PpoConfig(GrpoConfig):
    command = "ppo"
    critic: CriticConfig = Field(default_factory=CriticConfig)
    algorithm: PpoAlgorithm = Field(default_factory=PpoAlgorithm)  # type: ignore[assignment]


@dataclass(frozen=True)
class Algorithm:
    """A training command."""

    config: type[Config]
    help: str
    rows: Literal["conversations", "prompts", "preferences", "any"] = "conversations"  # in `data.train`
    held_out: tuple[str, ...] = ()  # figures by which a best step can be chosen, logged as validation_*
    function: str | None = None  # `module:function`: config -> exit status; None: the one of the command's name

    @property
    def name(self) -> str:
        return self.config.command

    def load(self) -> Callable[[Any], int]:
        """The function; imports its module, and torch with it."""
        own = self.name.replace("-", "_")
        module, name = (self.function or f"megatron_posttrain.algorithms.{own}:{own}").split(":")
        return getattr(importlib.import_module(module), name)


LOSS, ACCURACY, REWARD = ("loss",), ("loss", "accuracy"), ("accuracy", "reward")
ALGORITHMS = {
    row.name: row
    for row in (
        Algorithm(SftConfig, "supervised fine-tuning", held_out=LOSS),
        Algorithm(GrpoConfig, "GRPO with vLLM in every trainer rank", "prompts", REWARD),
        Algorithm(PpoConfig, "PPO with a critic, and vLLM in every trainer rank", "prompts", REWARD),
        Algorithm(DpoConfig, "preferences: DPO and its relatives, KTO", "preferences", ACCURACY),
        Algorithm(RewardModelConfig, "a scalar reward from pairs", "preferences", ACCURACY),
        Algorithm(DistillConfig, "a student learns a teacher's distributions", held_out=LOSS),
        Algorithm(ScoreConfig, "log-probabilities of the tokens of conversations", "any"),
    )
}
