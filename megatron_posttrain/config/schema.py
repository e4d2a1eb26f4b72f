"""The configuration: a typed tree. Field descriptions are the documentation; `--help` prints them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    field_validator,
    model_validator,
)

from megatron_posttrain.errors import nearest

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Number = TypeVar("Number")


def _check_steps(values: dict[int, Number]) -> dict[int, Number]:
    if list(values) != sorted(values) or next(iter(values), None) != 0:
        raise ValueError(f"steps must rise from 0, found {', '.join(map(str, values)) or 'none'}")
    return values


if TYPE_CHECKING:
    Scheduled = Annotated[Number, "a number, once `Section.at` was asked for one"]
else:  # a number, or numbers by step: {0: 8192, 500: 16384} is 16384 after 500 steps
    ByStep = Annotated[dict[NonNegativeInt, Number], AfterValidator(_check_steps), Tag("by step")]
    Scheduled = Annotated[
        Annotated[Number, Tag("number")] | ByStep,
        Discriminator(lambda value: "by step" if isinstance(value, dict) else "number"),
    ]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    def at(self, step: int | None) -> Self:
        """With a number for every schedule: that of step `step` (from 0), or None: the largest of all steps."""
        found: dict[str, Any] = {}
        for name, value in self:
            if isinstance(value, Section):
                found[name] = value.at(step)
            elif isinstance(value, dict) and 0 in value:
                found[name] = max(value.values()) if step is None else value[max(s for s in value if s <= step)]
        return self.model_copy(update=found)


class MoeConfig(Section):
    load_balancing: Literal["aux_loss", "seq_aux_loss", "global_aux_loss", "none"] = Field(
        "aux_loss", description="balance over a micro-batch, a sequence, the global batch, or not at all"
    )
    aux_loss_coefficient: NonNegativeFloat | None = Field(
        None, description="weight of the balancing loss; null: what the checkpoint's config says"
    )
    z_loss_coefficient: NonNegativeFloat = Field(0.0, description="of routers' mean squared log-sum-exp of logits")
    dispatcher: Literal["alltoall", "deepep"] = Field(
        "alltoall", description="how tokens reach their experts; deepep needs the package deep_ep and CUDA"
    )


class ModelConfig(Section):
    path: str = Field(description="Hugging Face directory or hub id in the local cache")
    tokenizer: str | None = Field(None, description="another tokenizer directory; null: the model's")
    random_init: bool = Field(False, description="start from random weights, read only the config")
    implementation: Literal["auto", "torch", "transformer_engine"] = Field(
        "auto", description="layer modules; auto: Transformer Engine on CUDA when installed, else torch"
    )
    recompute: Literal["none", "selective", "full"] = Field("none", description="activation recomputation")
    moe: MoeConfig = Field(default_factory=MoeConfig, description="mixture of experts")


class ParallelConfig(Section):
    tensor: PositiveInt = Field(1, description="tensor parallel ranks")
    pipeline: PositiveInt = Field(1, description="pipeline stages")
    virtual_pipeline: PositiveInt | None = Field(None, description="model chunks a stage (interleaved)")
    context: PositiveInt = Field(1, description="context parallel ranks")
    expert: PositiveInt = Field(1, description="expert parallel ranks")
    expert_tensor: PositiveInt = Field(1, description="tensor parallel ranks inside an expert")
    sequence: bool = Field(True, description="sequence parallelism; takes effect where tensor > 1")
    overlap: bool | None = Field(
        None, description="reduce gradients during backward, gather weights during forward; null: on CUDA"
    )


class PrecisionConfig(Section):
    dtype: Literal["fp32", "bf16"] = Field("bf16", description="of weights and activations; main weights are fp32")
    fp8: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] | None = Field(
        None, description="FP8 recipe; needs Transformer Engine"
    )
    bf16_ends: NonNegativeInt = Field(
        0, description="with fp8: layers at the start, and as many at the end, that stay in bf16"
    )


# Our names of columns, which `data.columns` gives the files' names for.
COLUMNS = (
    "messages", "conversations", "prompt", "question", "problem", "response", "completion", "instruction", "input",
    "output", "context", "text", "answer", "solution", "chosen", "rejected", "margin", "label", "system", "history",
    "tools", "metadata", "chat_template_kwargs",
)  # fmt: skip


def check_columns(columns: dict[str, Any]) -> dict[str, Any]:
    """Raises ValueError for a name that is none of ours."""
    for name in columns:
        if name not in COLUMNS:
            raise ValueError(f"no column {name!r}{nearest(str(name), COLUMNS)}; allowed: {', '.join(COLUMNS)}")
    return columns


ColumnNames = Annotated[dict[str, str | list[str]], AfterValidator(check_columns)]


class DataConfig(Section):
    train: str | list[str | dict[str, Any]] = Field(
        description="JSONL file(s), or any `datasets` source; as {path: FILE, weight: 2.0} a mixture: an epoch takes "
        "as many conversations as all sources have, of each in proportion to its weight (1 where there is none)"
    )
    validation: str | list[str] | None = Field(
        None,
        description="as `train`; its loss (RL: accuracy, by file where there are several) is logged every "
        "training.validate_every steps and at the end",
    )
    columns: ColumnNames = Field(
        default_factory=dict,
        description="our column names to the files': {prompt: question, answer: final_answer}; question.stem reaches "
        "into a column, a list joins several",
    )
    train_on: Literal["all-assistant", "last-assistant", "everything"] = Field(
        "all-assistant",
        description="tokens that count: all assistant turns', the last one's, or all; a turn's `weight` multiplies its "
        "tokens' loss, and the loss is sum(weight x loss) / sum(weight)",
    )
    cache: str | None = Field(
        None, description="directory of tokenised rows, shared by runs; null: .cache beside `output`"
    )
    omissions: Literal["refuse", "allow"] = Field(
        "refuse", description="rows of which the chat template leaves a text, a tool or a tool call out"
    )
    sequence_length: PositiveInt = Field(2048, description="tokens of a packed row; RL: of a micro-batch row")
    packing: bool = Field(True, description="several conversations a row, without attention across them")
    overlong: Literal["drop", "truncate"] = Field(
        "drop", description="what to do with a conversation longer than sequence_length; counted and reported"
    )

    @property
    def held_out(self) -> list[str]:
        """Sources of `validation`."""
        return [self.validation] if isinstance(self.validation, str) else self.validation or []

    @property
    def sources(self) -> list[str]:
        """Of `train`, in order."""
        train = [self.train] if isinstance(self.train, str) else self.train
        return [source if isinstance(source, str) else source["path"] for source in train]

    @property
    def weights(self) -> list[float] | None:
        """Of each of `sources`; None where none is given."""
        found = [source["weight"] if isinstance(source, dict) else None for source in self.train]
        return [float(weight or 1) for weight in found] if any(found) else None

    @field_validator("train", mode="before")
    @classmethod
    def _known_sources(cls, train: Any) -> Any:
        for entry in train if isinstance(train, list) and train else [train]:
            weight = entry.get("weight") if isinstance(entry, dict) and set(entry) == {"path", "weight"} else None
            right = isinstance(weight, int | float) and 0 < weight < math.inf and isinstance(entry["path"], str)
            if not isinstance(entry, str) and not right:
                raise ValueError(f"{entry!r} is no source; allowed: paths and {{path: FILE, weight: NUMBER above 0}}")
        return train


class OptimizerConfig(Section):
    lr: PositiveFloat = Field(1e-5, description="peak learning rate")
    min_lr: NonNegativeFloat = Field(0.0, description="learning rate at the end of the schedule")
    warmup_steps: NonNegativeInt = Field(0, description="steps of linear warm-up")
    schedule: Literal["cosine", "linear", "constant", "wsd"] = Field(
        "cosine", description="decay after the warm-up; wsd: none until the last decay_steps, then linear"
    )
    decay_steps: PositiveInt | None = Field(None, description="of wsd; null: a tenth of all steps")
    router_lr: PositiveFloat | None = Field(None, description="peak of routers, on the same schedule; null: lr")
    weight_decay: NonNegativeFloat = 0.1
    decay: Literal["matrices", "all"] = Field("matrices", description="what decays; all: norms and biases too")
    clip_grad: NonNegativeFloat = Field(1.0, description="global gradient norm; 0: no clipping")
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    epsilon: PositiveFloat = 1e-8

    @model_validator(mode="after")
    def _falls(self) -> Self:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr={self.min_lr} is above lr={self.lr}, and is where the schedule ends")
        return self


class TrainingConfig(Section):
    steps: PositiveInt | None = Field(
        None, description="optimizer steps (RL: rollout steps); null: from epochs; with both, the fewer"
    )
    epochs: PositiveFloat | None = Field(None, description="passes over the data; null: from steps")
    global_batch_size: PositiveInt = Field(32, description="rows an optimizer step; RL: samples")
    micro_batch_size: PositiveInt = Field(1, description="rows a forward pass of one data parallel rank")
    seed: NonNegativeInt = 0
    validate_every: PositiveInt | None = Field(
        None, description="steps between looks at data.validation; null: with every checkpoint"
    )
    patience: PositiveInt | None = Field(None, description="looks with no better checkpoint.best, to stop early after")
    skip_not_finite: NonNegativeInt = Field(
        0, description="steps in a row, never the first, that are left out when loss or gradient is not finite"
    )
    ema: float | None = Field(
        None, gt=0, lt=1, description="decay of an average of the weights, exported in their place; null: none"
    )


class LoraConfig(Section):
    rank: PositiveInt = 16
    alpha: PositiveFloat = Field(32.0, description="the change of a weight is alpha / rank x B A")
    use_rslora: bool = Field(False, description="rank-stabilised: alpha / sqrt(rank) in place of alpha / rank")
    use_dora: bool = Field(
        False, description="the magnitudes of a weight's rows are trained apart from their directions (DoRA)"
    )
    dropout: Fraction = Field(0.0, description="of an adapter's inputs")
    targets: str | list[str] = Field(
        "all-linear",
        description="all-linear (attention and MLP, experts included), or Hugging Face names of linear layers: "
        "q_proj, experts.down_proj, ..., also the router's (gate) and lm_head",
    )
    quantization: Literal["nf4"] | None = Field(
        None, description="of the model's own linear layers, which stay frozen: NF4 with double quantisation (QLoRA)"
    )

    @model_validator(mode="after")
    def _whole_inputs(self) -> Self:
        if self.use_dora and self.dropout:
            raise ValueError(f"dropout={self.dropout} and use_dora do not go together; allowed: dropout=0.0")
        return self


class CheckpointConfig(Section):
    every: PositiveInt | None = Field(
        None, description="steps between checkpoints; null: on a stop signal, and before the export, until it is whole"
    )
    keep: PositiveInt = Field(2, description="newest checkpoints kept")
    best: str | None = Field(
        None, description="held-out figure, such as validation_loss, whose best step is kept beside the newest ones"
    )
    best_is: Literal["lower", "higher"] | None = Field(None, description="null: lower for validation_loss, else higher")
    export: Literal["last", "best"] = Field("last", description="step that is written to hf/ and adapter/")
    asynchronous: bool = Field(
        False, description="training goes on while a copy in host memory (12 bytes a parameter + weights) is written"
    )
    resume: Literal["auto", "never"] = Field("auto", description="auto: from the newest whole checkpoint of `output`")


class LoggingConfig(Section):
    every: PositiveInt = Field(1, description="steps between progress lines")
    tensorboard: bool = True
    wandb: str | None = Field(None, description="Weights & Biases project; needs the package wandb")
    mlflow: str | None = Field(None, description="MLflow experiment; needs the package mlflow")
    profile: PositiveInt | None = Field(
        None, description="steps, from this start's second on, whose torch trace is written to OUTPUT/profile"
    )
    hang_seconds: PositiveFloat | None = Field(
        None,
        allow_inf_nan=False,
        description="seconds after which a step's phase, a checkpoint or an export is called a hang: the job ends; "
        "null: 20 times the longest recent step, at least 600 (1500 in the first steps and outside of phases)",
    )


class RolloutConfig(Section):
    prompts_per_step: PositiveInt = 32
    samples_per_prompt: PositiveInt = 8
    validation_samples: PositiveInt = Field(
        1, description="of each prompt of data.validation, drawn as in training: accuracy (mean@k) and pass@k"
    )
    max_tokens: Scheduled[PositiveInt] = Field(
        1024,
        description="of a response, all turns of an environment and its answers; this and other numbers may be given "
        "by step: {0: 8192, 500: 16384}",
    )
    thinking_tokens: PositiveInt | None = Field(
        None, description="after which a turn's reasoning is ended with `thinking_stop`; null: never"
    )
    thinking_stop: str = Field(
        "\nThe time for thinking is over, so I answer now.\n", description="text before the end of reasoning"
    )
    temperature: Scheduled[PositiveFloat] = Field(1.0, description="may be given by step")
    repetitions: int | None = Field(
        None,
        ge=2,
        description="of up to 64 tokens, one behind the other, that end a response as max_tokens does; null: none do",
    )
    oversample: NonNegativeInt = Field(
        0, description="prompts that are begun beside prompts_per_step; when so many are complete the step ends"
    )
    partial: bool = Field(
        False,
        description="prompts that oversample cut off go on in the next step, which waits for them; else they are "
        "dropped, and long responses are seen more rarely",
    )
    ahead: NonNegativeInt = Field(
        0,
        description="steps for which samples are drawn before they are trained on; without importance_cap and bands "
        "their recorded log-probs are then the old policy's, as with partial",
    )
    replay: str | None = Field(
        None, description="directory `rollouts` of a run, whose samples and rewards are trained on without an engine"
    )
    tensor: PositiveInt = Field(1, description="tensor parallel ranks of a vLLM engine")
    max_num_seqs: PositiveInt = Field(
        256, description="samples that an engine runs at once; others are handed to the first that has room"
    )
    expert: bool = Field(
        False, description="an engine's ranks hold whole experts each, instead of a slice of every one"
    )
    kv_cache_gib: PositiveFloat | None = Field(
        None, description="cache of one engine rank, GiB; null: 0.25 on CPU, sized by vLLM on CUDA"
    )
    gpu_memory_fraction: Fraction = Field(0.5, description="of a GPU, for vLLM weights and cache")
    offload: bool = Field(
        False, description="while vLLM is awake: optimizer states in host memory, gradients given back (bf16)"
    )
    quantization: Literal["fp8"] | None = Field(
        None, description="of vLLM's linear layers, in every refit; CUDA; null: as the trainer's weights"
    )
    adapters: Literal["merge", "ship"] = Field(
        "merge", description="with lora, what a refit brings: the merged model, or the adapter beside vLLM's own base"
    )
    token_figures: bool = Field(
        False, description="each token's log-prob difference, advantage and, with one update, entropy into rollouts/"
    )
    proof_tolerance: PositiveFloat | None = Field(
        None, description="largest canary log-prob difference after a refit; null: 1e-3 in fp32, 0.25 (mean) in bf16"
    )


class RewardConfig(Section):
    name: str
    weight: float = 1.0
    file: str | None = Field(None, description="Python file that defines it with @reward(name)")
    path: str | None = Field(None, description="of reward_model: OUTPUT/hf of the command reward-model")
    args: dict[str, Any] = Field(default_factory=dict, description="the reward's own parameters")
    on_error: Literal["mask"] | float = Field(
        "mask", description="of a sample that it cannot grade: it does not train, or its value"
    )
    seconds: PositiveFloat | None = Field(None, description="after which it failed on a sample; null: never")


class EnvironmentConfig(Section):
    name: str = Field(description="calculator | python | search | questions, or one that `file` defines")
    file: str | None = Field(None, description="Python file that defines it with @environment(name)")
    args: dict[str, Any] = Field(default_factory=dict, description="the environment's own parameters")
    max_turns: PositiveInt = Field(8, description="of the model in a conversation")
    seconds: PositiveFloat = Field(30.0, description="after which an answer is an error that the model is told")


class SandboxConfig(Section):
    unsafe: bool = Field(False, description="run programs where they cannot be isolated, with limits only")


class Config(Section):
    model: ModelConfig
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    precision: PrecisionConfig = Field(default_factory=PrecisionConfig)
    data: DataConfig
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    lora: LoraConfig | None = Field(None, description="adapters are trained, the model itself is frozen")
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    logging: LoggingConfig = Field(default_factory=LoggingConfig)
    output: str = Field(description="directory that the run writes")

    command: ClassVar[str] = ""
    # Keys that the command would ignore, and why; refused where they are not at their default.
    ignored: ClassVar[dict[str, str]] = {}
    mixes: ClassVar[bool] = False  # whether the weights of `data.train` have an effect

    @property
    def output_dir(self) -> Path:
        return Path(self.output)

    @property
    def cache_dir(self) -> Path:
        return Path(self.data.cache) if self.data.cache else self.output_dir.absolute().parent / ".cache"

    @property
    def samples(self) -> bool:
        """Whether every trainer rank holds a rank of a vLLM engine."""
        return False

    @property
    def rows_per_step(self) -> int:
        """Rows of the data that a step takes."""
        return self.training.global_batch_size

    def problems(self, world_size: int) -> Iterator[str]:
        """What the command cannot do with these values on so many ranks, one reason each."""
        yield from ()
