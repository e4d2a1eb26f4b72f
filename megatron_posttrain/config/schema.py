"""The configuration: a typed tree. Field descriptions are the documentation; `--help` prints them."""

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


def key(default: Any, description: str, **constraints: Any) -> Any:
    """A field with a default; those without one are pydantic's `Field`."""
    return Field(default, description=description, **constraints)


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
    load_balancing: Literal["aux_loss", "seq_aux_loss", "global_aux_loss", "none"] = key(
        "aux_loss", "balance over a micro-batch, a sequence, the global batch, or not at all"
    )
    aux_loss_coefficient: NonNegativeFloat | None = key(None, "weight of the balancing loss; null: the checkpoint's")
    z_loss_coefficient: NonNegativeFloat = key(0.0, "of routers' mean squared log-sum-exp of logits")
    dispatcher: Literal["alltoall", "deepep"] = key("alltoall", "how tokens reach experts; deepep: CUDA and deep_ep")


class ModelConfig(Section):
    path: str = Field(description="Hugging Face directory or hub id in the local cache")
    tokenizer: str | None = key(None, "another tokenizer directory; null: the model's")
    random_init: bool = key(False, "start from random weights, read only the config")
    implementation: Literal["auto", "torch", "transformer_engine"] = key(
        "auto", "layer modules; auto: Transformer Engine on CUDA when installed, else torch"
    )
    recompute: Literal["none", "selective", "full"] = key("none", "activation recomputation")
    moe: MoeConfig = Field(default_factory=MoeConfig, description="mixture of experts")


class ParallelConfig(Section):
    tensor: PositiveInt = key(1, "tensor parallel ranks")
    pipeline: PositiveInt = key(1, "pipeline stages")
    virtual_pipeline: PositiveInt | None = key(None, "model chunks a stage (interleaved)")
    context: PositiveInt = key(1, "context parallel ranks")
    expert: PositiveInt = key(1, "expert parallel ranks")
    expert_tensor: PositiveInt = key(1, "tensor parallel ranks inside an expert")
    sequence: bool = key(True, "sequence parallelism; takes effect where tensor > 1")
    overlap: bool | None = key(None, "reduce gradients during backward, gather weights during forward; null: on CUDA")


class PrecisionConfig(Section):
    dtype: Literal["fp32", "bf16"] = key("bf16", "of weights and activations; main weights are fp32")
    fp8: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] | None = key(None, "needs Transformer Engine")
    bf16_ends: NonNegativeInt = key(0, "with fp8: layers at the start, and as many at the end, that stay in bf16")
    head: Literal["fp32"] | None = key(
        None, "fp32: logits of trainer and vLLM are not rounded to bf16 (arXiv 2506.13585, 2510.13786)"
    )

    def fingerprint(self) -> str:
        """For caches, those of versions that had no `head` among them."""
        return self.model_dump_json(exclude={"head"} if self.head is None else None)


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
    validation: str | list[str] | None = key(
        None, "as `train`; its loss (RL: accuracy) is logged every training.validate_every steps and at the end"
    )
    columns: ColumnNames = key(
        {}, "ours to the files' names: {prompt: question}; question.stem reaches into a column, a list joins several"
    )
    train_on: Literal["all-assistant", "last-assistant", "everything"] = key(
        "all-assistant",
        "tokens that count: all assistant turns', the last one's, or all; a turn's `weight` multiplies its "
        "tokens' loss, and the loss is sum(weight x loss) / sum(weight)",
    )
    cache: str | None = key(None, "directory of tokenised rows, shared by runs; null: .cache beside `output`")
    omissions: Literal["refuse", "allow"] = key("refuse", "rows of which the template leaves text or tools out")
    sequence_length: PositiveInt = key(2048, "tokens of a packed row; RL: of a micro-batch row")
    packing: bool = key(True, "several conversations a row, without attention across them")
    overlong: Literal["drop", "truncate"] = key("drop", "conversations longer than sequence_length; counted")

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
    lr: PositiveFloat = key(1e-5, "peak learning rate")
    min_lr: NonNegativeFloat = key(0.0, "learning rate at the end of the schedule")
    warmup_steps: NonNegativeInt = key(0, "steps of linear warm-up")
    schedule: Literal["cosine", "linear", "constant", "wsd"] = key(
        "cosine", "decay after the warm-up; wsd: none until the last decay_steps, then linear"
    )
    decay_steps: PositiveInt | None = key(None, "of wsd; null: a tenth of all steps")
    router_lr: PositiveFloat | None = key(None, "peak of routers, on the same schedule; null: lr")
    weight_decay: NonNegativeFloat = 0.1
    decay: Literal["matrices", "all"] = key("matrices", "what decays; all: norms and biases too")
    clip_grad: NonNegativeFloat = key(1.0, "global gradient norm; 0: no clipping")
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    epsilon: PositiveFloat = 1e-8

    @model_validator(mode="after")
    def _falls(self) -> Self:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr={self.min_lr} is above lr={self.lr}, and is where the schedule ends")
        return self


class TrainingConfig(Section):
    steps: PositiveInt | None = key(None, "optimizer (RL: rollout) steps; null: from epochs; with both, the fewer")
    epochs: PositiveFloat | None = key(None, "passes over the data; null: from steps")
    global_batch_size: PositiveInt = key(32, "rows an optimizer step; RL: samples")
    micro_batch_size: PositiveInt = key(1, "rows a forward pass of one data parallel rank")
    seed: NonNegativeInt = 0
    validate_every: PositiveInt | None = key(None, "steps between looks at data.validation; null: with checkpoints")
    patience: PositiveInt | None = key(None, "looks with no better checkpoint.best, to stop early after")
    skip_not_finite: NonNegativeInt = key(0, "steps in a row, never the first, that are left out if not finite")
    ema: float | None = key(None, "decay of an average of the weights, exported in their place; null: none", gt=0, lt=1)


class LoraConfig(Section):
    rank: PositiveInt = 16
    alpha: PositiveFloat = key(32.0, "the change of a weight is alpha / rank x B A")
    use_rslora: bool = key(False, "rank-stabilised: alpha / sqrt(rank) in place of alpha / rank")
    use_dora: bool = key(False, "the magnitudes of a weight's rows are trained apart from their directions (DoRA)")
    dropout: Fraction = key(0.0, "of an adapter's inputs")
    targets: str | list[str] = key(
        "all-linear",
        "all-linear (attention and MLP, experts included), or Hugging Face names of linear layers: "
        "q_proj, experts.down_proj, ..., also the router's (gate) and lm_head",
    )
    quantization: Literal["nf4"] | None = key(
        None, "of the model's own linear layers, which stay frozen: NF4 with double quantisation (QLoRA)"
    )

    @model_validator(mode="after")
    def _whole_inputs(self) -> Self:
        if self.use_dora and self.dropout:
            raise ValueError(f"dropout={self.dropout} and use_dora do not go together; allowed: dropout=0.0")
        return self


class CheckpointConfig(Section):
    every: PositiveInt | None = key(
        None, "steps between checkpoints; null: on a stop signal, and before the export, until it is whole"
    )
    keep: PositiveInt = key(2, "newest checkpoints kept")
    best: str | None = key(None, "held-out figure (validation_loss) whose best step is kept beside the newest ones")
    best_is: Literal["lower", "higher"] | None = key(None, "null: lower for validation_loss, else higher")
    export: Literal["last", "best"] = key("last", "step that is written to hf/ and adapter/")
    asynchronous: bool = key(False, "trains on while a copy in host memory (12 bytes a parameter + weights) is written")
    resume: Literal["auto", "never"] = key("auto", "auto: from the newest whole checkpoint of `output`")


class LoggingConfig(Section):
    every: PositiveInt = key(1, "steps between progress lines")
    tensorboard: bool = True
    wandb: str | None = key(None, "Weights & Biases project; needs the package wandb")
    mlflow: str | None = key(None, "MLflow experiment; needs the package mlflow")
    profile: PositiveInt | None = key(None, "steps, from this start's second, with a torch trace in OUTPUT/profile")
    hang_seconds: PositiveFloat | None = key(
        None,
        "seconds after which a step's phase, a checkpoint or an export is called a hang: the job ends; "
        "null: 20 times the longest recent step, at least 600 (1500 in the first steps and outside of phases)",
        allow_inf_nan=False,
    )


class RolloutConfig(Section):
    prompts_per_step: PositiveInt = 32
    samples_per_prompt: PositiveInt = 8
    validation_samples: PositiveInt = key(1, "of a prompt of data.validation, drawn as in training: mean@k, pass@k")
    max_tokens: Scheduled[PositiveInt] = key(
        1024, "of a response, an environment's turns and answers included; also by step: {0: 8192, 500: 16384}"
    )
    thinking_tokens: PositiveInt | None = key(None, "after which reasoning is ended with thinking_stop; null: never")
    thinking_stop: str = key("\nThe time for thinking is over, so I answer now.\n", "text before the end of reasoning")
    temperature: Scheduled[PositiveFloat] = key(1.0, "may be given by step")
    repetitions: int | None = key(
        None, "of up to 64 tokens, one behind the other, that end a response as max_tokens does; null: none do", ge=2
    )
    oversample: NonNegativeInt = key(0, "prompts begun beside prompts_per_step; with so many complete a step ends")
    partial: bool = key(
        False, "prompts that oversample cut off go on in the next step; else they are dropped, long ones more often"
    )
    ahead: NonNegativeInt = key(
        0, "steps that samples are drawn ahead; without importance_cap and bands theirs is the old policy"
    )
    replay: str | None = key(None, "`rollouts` of a run, whose samples are trained on without an engine")
    ranks: NonNegativeInt = key(
        0, "last ranks of the job, which only generate, while the others train; 0: every rank does both, in turns"
    )
    in_flight: bool = key(False, "rollout ranks take new weights between two tokens; what they draw then goes on")
    tensor: PositiveInt = key(1, "tensor parallel ranks of a vLLM engine")
    max_num_seqs: PositiveInt = key(256, "samples that an engine runs at once; others wait for the first with room")
    expert: bool = key(False, "an engine's ranks hold whole experts each, instead of a slice of every one")
    kv_cache_gib: PositiveFloat | None = key(None, "cache of an engine's rank, GiB; null: 0.25 on CPU, else vLLM's")
    gpu_memory_fraction: Fraction = key(0.5, "of a GPU, for vLLM weights and cache")
    offload: bool = key(False, "while vLLM is awake: optimizer states in host memory, gradients given back (bf16)")
    quantization: Literal["fp8"] | None = key(None, "of vLLM's linear layers; CUDA; null: the trainer's dtype")
    adapters: Literal["merge", "ship"] = key(
        "merge", "with lora, what a refit brings: the merged model, or the adapter beside vLLM's own base"
    )
    token_figures: bool = key(False, "tokens' log-prob difference, advantage, with one update entropy, into rollouts/")
    proof_tolerance: PositiveFloat | None = key(
        None, "largest canary log-prob difference after a refit; null: 1e-3 in fp32, 0.25 (mean) in bf16"
    )
    proof_every: PositiveInt = key(1, "refits from one look at canaries to the next; digests are compared at each")


class RewardConfig(Section):
    name: str
    weight: float = 1.0
    file: str | None = key(None, "Python file that defines it with @reward(name)")
    path: str | None = key(None, "of reward_model: OUTPUT/hf of the command reward-model")
    args: dict[str, Any] = key({}, "the reward's own parameters")
    on_error: Literal["mask"] | float = key("mask", "of a sample that it cannot grade: it does not train, or its value")
    seconds: PositiveFloat | None = key(None, "after which it failed on a sample; null: never")


class EnvironmentConfig(Section):
    name: str = Field(description="calculator | python | search | questions, or one that `file` defines")
    file: str | None = key(None, "Python file that defines it with @environment(name)")
    args: dict[str, Any] = key({}, "the environment's own parameters")
    max_turns: PositiveInt = key(8, "of the model in a conversation")
    seconds: PositiveFloat = key(30.0, "after which an answer is an error that the model is told")


class SandboxConfig(Section):
    unsafe: bool = key(False, "run programs where they cannot be isolated, with limits only")


class Config(Section):
    model: ModelConfig
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    precision: PrecisionConfig = Field(default_factory=PrecisionConfig)
    data: DataConfig
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    lora: LoraConfig | None = key(None, "adapters are trained, the model itself is frozen")
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
    def rollout_ranks(self) -> int:
        """The last ranks of a job, which only generate."""
        return 0

    @property
    def rows_per_step(self) -> int:
        """Rows of the data that a step takes."""
        return self.training.global_batch_size

    def problems(self, world_size: int) -> Iterator[str]:
        """What the command cannot do with these values on so many ranks, one reason each."""
        yield from ()
