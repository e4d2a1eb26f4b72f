"""The job: config, model, layout, batch, data, and whether it fits in the memory of a cluster."""

import math
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

from megatron_posttrain.config.algorithms import (
    ALGORITHMS,
    DistillConfig,
    DpoConfig,
    GrpoConfig,
    PpoConfig,
    RewardModelConfig,
)
from megatron_posttrain.config.load import load_config
from megatron_posttrain.config.schema import Config
from megatron_posttrain.data.dataset import TokenizedDataset, read_conversations
from megatron_posttrain.data.rows import read_rows
from megatron_posttrain.doctor.findings import Findings, Status
from megatron_posttrain.errors import UserError
from megatron_posttrain.models.architecture import Architecture
from megatron_posttrain.models.build import check_fp8
from megatron_posttrain.parallel.layout import Layout
from megatron_posttrain.planning.gpus import COMPUTE_CAPABILITIES, Gpu, find_gpu
from megatron_posttrain.planning.known_models import load_architecture
from megatron_posttrain.planning.planner import Estimate, plan, plan_layout
from megatron_posttrain.planning.recipe import rollout_of
from megatron_posttrain.planning.rollout import weight_elements
from megatron_posttrain.planning.workload import Workload
from megatron_posttrain.platform import platform
from megatron_posttrain.training.limits import check_positions, prompts_of, rollout_problems
from megatron_posttrain.training.prepare import (
    batch_problems,
    check_ranks,
    model_directory,
    prepare,
    read_architecture,
    read_tokenizer,
)  # fmt: skip

FP8_PRECISIONS = {"mxfp8": "mxfp8", None: "bf16"}  # config's recipe -> the planner's precision; all others: fp8


@dataclass(frozen=True)
class Cluster:
    """What is to be assumed of the machine that the job will run on."""

    gpus: int
    gpu: Gpu

    @classmethod
    def parse(cls, text: str) -> Self:
        """`8xH100`. Raises UserError."""
        match = re.fullmatch(r"\s*(\d+)\s*[xX*]\s*([A-Za-z]+\d+)\s*", text)
        if match is None or int(match[1]) < 1:
            raise UserError(f"--assume '{text}': expected a number of GPUs and their type, such as 8xH100")
        return cls(int(match[1]), find_gpu(match[2]))


def read_config(command: str | None, file: str, overrides: Sequence[str]) -> tuple[str, Config]:
    """(command, config); without a command the first one whose keys the file has. Raises UserError."""
    if command is not None:
        return command, load_config(ALGORITHMS[command].config, file, overrides)
    errors = []
    for name, row in ALGORITHMS.items():
        try:
            return name, load_config(row.config, file, overrides)
        except UserError as error:
            errors.append((len(str(error).splitlines()), name, str(error)))
    _, name, text = min(errors)
    raise UserError(f"{text} (as a config of `{name}`; --command says which one it is for)")


@dataclass
class JobCheck:
    """Checks one config for `ranks` ranks; what is on another machine only is marked, not failed, with `cluster`."""

    findings: Findings
    command: str
    config: Config
    ranks: int
    cluster: Cluster | None
    model: str | None  # whose shapes to assume where the config's model is not here
    arch: Architecture | None = None
    tokenizer: Any = None

    def run(self) -> None:
        directory = self._model()
        layout = self.check_layout()
        if place := self.config.model.tokenizer or directory:
            self.tokenizer = self.findings.attempt(
                "tokenizer",
                lambda: read_tokenizer(place, self.arch),
                lambda tokenizer: f"{len(tokenizer)} tokens, chat template found",
                "use the tokenizer that the model was trained with",
            )
        if isinstance(self.config, GrpoConfig | DistillConfig) and self.config.samples:
            self._engine(self.config)
        self._data()
        if self.cluster is not None and layout is not None:
            self._memory(layout, self.cluster)
        elif directory is not None and not self.findings.failed:
            # Whatever training would still refuse on this machine.
            start = "start of training"
            self.findings.attempt(start, lambda: prepare(self.config, self.ranks), lambda _: "nothing refused")

    def _model(self) -> Path | None:
        path = self.config.model.path
        try:
            directory = model_directory(path)
        except UserError as error:
            self._absent_model(error)
            return None
        what = "config only (random_init)" if self.config.model.random_init else "every tensor there and in shape"
        self.arch = self.findings.attempt(
            "model",
            lambda: read_architecture(self.config, directory),
            lambda arch: f"{directory}: {_size(arch)}, {what}",
        )
        return directory

    def _absent_model(self, error: UserError) -> None:
        try:
            name, self.arch = load_architecture(self.model or self.config.model.path)
            shown = f"{self.config.model.path} is not on this machine; shapes of {name}, {_size(self.arch)}"
        except UserError as unknown:
            if self.model is not None:
                self.findings.add("fail", "model", str(unknown))
                return
            shown = f"{self.config.model.path} is not on this machine, so neither shapes nor memory"
        if self.cluster is None:
            self.findings.add("fail", "model", str(error))
        else:
            fix = "" if self.arch is not None else "name its shapes: --model NAME_OR_CONFIG"
            self.findings.add("not checked here", "model", shown, fix)

    def check_layout(self) -> Layout | None:
        config, findings = self.config, self.findings
        limits = "" if self.arch is not None else " (for the ranks; the model's shapes are not known)"
        limits = f" and {config.rollout_ranks} rollout ranks{limits}" if config.rollout_ranks else limits
        layout = findings.attempt(
            "layout",
            lambda: check_ranks(config, self.ranks, self.arch),
            lambda found: f"{found} on {found.world_size} ranks{limits}",
        )
        if layout is None:
            return None
        shown = f"{config.training.global_batch_size} rows or samples an optimizer step on {layout.data} replicas"
        fix = "change training.* or rollout.* to a multiple"
        findings.verdict("batch", batch_problems(config, layout), shown, fix)
        return layout

    def _engine(self, config: GrpoConfig | DistillConfig) -> None:
        """What vLLM would refuse."""
        shapes = "" if self.arch is not None else " (the model's shapes are not known)"
        wrong = rollout_problems(config, self.arch, self.device)
        self.findings.verdict("rollout", wrong, f"nothing that vLLM would refuse on {self.device}{shapes}")

    @property
    def rows(self) -> str:
        """What `data.train` holds."""
        return ALGORITHMS[self.command].rows

    @property
    def device(self) -> str:
        return platform().name if self.cluster is None else "cuda"

    def _data(self) -> None:
        data = self.config.data
        self._source("data", data.sources)
        if data.validation is not None and self.rows != "any":
            self._source("validation", data.held_out)
        if isinstance(self.config, GrpoConfig):
            from megatron_posttrain.rewards.registry import load_rewards

            read = partial(load_rewards, self.config.rewards, unsafe=self.config.sandbox.unsafe)
            self.findings.attempt("rewards", read, lambda found: ", ".join(reward.name for reward in found))

    def _source(self, check: str, sources: list[str]) -> None:
        missing = [place for place in sources if not Path(place).exists()]
        if missing:
            # A name may be a data set's on a hub; it is not fetched for a check.
            status: Status = "not checked here" if self.cluster is not None else "fail"
            key = "data.train" if check == "data" else "data.validation"
            fix = "" if self.cluster is not None else f"correct {key}, or fetch the file first"
            self.findings.add(status, check, f"{', '.join(missing)}: not on this machine", fix)
            return
        if self.tokenizer is not None and self.rows == "conversations":
            dataset = self.findings.attempt(check, lambda: self._conversations(check == "validation"))
            if dataset is not None:
                lost = dataset.dropped > (len(dataset) + dataset.dropped) // 10
                fix = "raise data.sequence_length, or set data.overlong=truncate" if lost else ""
                self.findings.add("warn" if lost else "ok", check, dataset.message, fix)
            return
        use = {"preferences": "preference", "conversations": "sft"}.get(self.rows)
        rows = self.findings.attempt(check, lambda: read_rows(sources, columns=self.config.data.columns, use=use))
        if rows is None:
            return
        if self.tokenizer is None:
            self.findings.add("ok", check, f"{len(rows):,} rows read; their lengths are not known without a tokenizer")
        elif isinstance(self.config, GrpoConfig):
            config = self.config
            from megatron_posttrain.rollout.turns import load_turns

            make = partial(load_turns, config.environment, config.rollout, self.tokenizer, unsafe=config.sandbox.unsafe)
            turns = self.findings.attempt("environment", make)
            if turns is not None:
                self.findings.attempt(
                    check, lambda: prompts_of(config, rows, self.tokenizer, turns.tools), lambda found: found.message
                )
        else:
            self.findings.add("ok", check, f"{len(rows):,} rows")

    def _conversations(self, held_out: bool) -> TokenizedDataset:
        with tempfile.TemporaryDirectory() as cache:
            dataset = read_conversations(self.config, self.tokenizer, Path(cache), held_out)
        if self.arch is not None:
            check_positions(dataset.lengths, self.arch)
        return dataset

    def _memory(self, layout: Layout, cluster: Cluster) -> None:
        arch, config = self.arch, self.config
        if arch is None:
            self.findings.add("not checked here", "memory", "needs the model's shapes", "give --model NAME_OR_CONFIG")
            return
        if config.rollout_ranks:
            self.findings.add("not checked here", "memory", "not planned with rollout.ranks", "try rollout.ranks=0")
            return
        try:
            check_fp8(arch, layout, config.precision, COMPUTE_CAPABILITIES[cluster.gpu.generation])
        except UserError as error:
            self.findings.add("fail", "precision", str(error))
            return
        work = self.findings.attempt("memory", lambda: workload(config))
        if work is None:
            return
        found = self.findings.attempt("memory", lambda: plan_layout(arch, layout, work, cluster.gpu))
        if found is None:
            return
        if work.task == "distill" and config.samples:
            self.findings.add("warn", "memory", "planned without vLLM, which comes on top")
        if config.precision.dtype == "fp32":
            self.findings.add("warn", "memory", "planned for bf16; fp32 weights and activations take twice the space",
                              "set precision.dtype=bf16 on GPUs")  # fmt: skip
        parts = sorted(((v, k) for k, v in found.memory_gib.items() if k != "total"), reverse=True)[:3]
        gpu, total = cluster.gpu, found.memory_gib["total"]
        shown = f"{total:.1f} of {gpu.memory_gib:.0f} GiB ({cluster.gpus}x{gpu.name}): "
        shown += ", ".join(f"{name.replace('_', ' ')} {size:.1f}" for size, name in parts)
        if found.fits:
            self.findings.add("ok", "memory", f"{shown}; about {found.step_seconds:.2f} s a step")
        else:
            shown = shown if total > gpu.memory_gib else f"{shown}; {found.reason}"
            self.findings.add("fail", "memory", shown, self._what_fits(arch, work, cluster))
        for warning in found.warnings:
            self.findings.add("warn", "plan", warning)

    def _what_fits(self, arch: Architecture, work: Workload, cluster: Cluster) -> str:
        gpu, kept = cluster.gpu, ("task", "lora_rank", "quantization", "beside", "beside_path")
        free = Workload(sequence_length=work.sequence_length, global_batch=work.global_batch,
                        **{name: getattr(work, name) for name in kept})  # fmt: skip
        best = plan(arch, cluster.gpus, free, gpu)[0]
        if best.fits:
            return _told(best, gpu)
        nodes = 2 * math.ceil(cluster.gpus / gpu.per_node)
        wider = plan(arch, nodes * gpu.per_node, free, gpu)[0]
        if wider.fits:
            return f"nothing fits on these GPUs; {nodes} nodes of {gpu.per_node}: {_told(wider, gpu)}"
        return "nothing fits on these GPUs: more of them, shorter sequences, or a smaller model (see `plan`)"


def _told(e: Estimate, gpu: Gpu) -> str:
    """`e`'s choices in the configuration's words."""
    rollout = rollout_of(e, gpu) if e.rollout is not None else {}
    chosen = "".join(f", rollout.{name}={str(value).lower()}" for name, value in rollout.items())
    return f"{e.layout}, micro_batch_size={e.micro_batch}, recompute={e.recompute}{chosen} fits"


def workload(config: Config) -> Workload:
    """The planner's view of a config."""
    work = Workload(
        "lora" if config.lora else "sft",
        config.data.sequence_length,
        config.training.global_batch_size,
        FP8_PRECISIONS.get(config.precision.fp8, "fp8"),
        config.training.micro_batch_size,
        config.model.recompute,
        lora_rank=config.lora.rank if config.lora else None,
        quantization=config.lora.quantization if config.lora else None,
    )
    if isinstance(config, DpoConfig | RewardModelConfig):
        return replace(work, task=config.command)
    if isinstance(config, DistillConfig):
        teacher = load_architecture(config.teacher.path)[1]
        return replace(work, task="distill", beside=teacher, beside_path=config.teacher.path)
    if not isinstance(config, GrpoConfig):
        return work
    rollout = config.rollout
    samples = rollout.prompts_per_step * rollout.samples_per_prompt
    critic = config.critic.path if isinstance(config, PpoConfig) else None
    return replace(
        work,
        task=config.command,
        beside=load_architecture(critic)[1] if critic else None,
        beside_path=critic or "",
        global_batch=samples,
        rollout_tensor=rollout.tensor,
        offload=rollout.offload,
        gpu_memory_fraction=rollout.gpu_memory_fraction,
        kv_cache_gib=rollout.kv_cache_gib,
    )


def fewest_ranks(config: Config) -> int:
    """The smallest number of ranks that the layout's sizes divide."""
    p = config.parallel
    return math.lcm(p.tensor * p.pipeline * p.context, p.expert * p.expert_tensor * p.pipeline) + config.rollout_ranks


def disk_gib(config: Config, arch: Architecture | None) -> float | None:
    """Of the kept checkpoints (weights, fp32 main weights and two moments) and the export."""
    if arch is None:
        return None
    width = 4 if config.precision.dtype == "fp32" else 2
    # The newest is written before the oldest goes.
    kept = (config.checkpoint.keep if config.checkpoint.every else 0) + (config.checkpoint.best is not None) + 1
    each = width + 12 + 4 * (config.training.ema is not None)
    return weight_elements(arch) * (kept * each + width) / 2**30


def _size(arch: Architecture) -> str:
    size = weight_elements(arch)
    return f"{arch.family}, {size / 1e9:.2f}B parameters" if size >= 1e7 else f"{arch.family}, {size:,.0f} parameters"
