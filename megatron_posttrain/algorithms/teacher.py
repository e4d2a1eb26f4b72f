"""The teacher of `distill`: a frozen model in the student's layout, of any size, or its likeliest tokens on disk.

Of a step it leaves its last hidden states, hidden size x 2 bytes a token in bf16; its logits are made one micro-batch
at a time, when the student's are there. Of its `top_k` tokens it leaves these and their log-probs.
"""

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_posttrain.config.algorithms import DistillConfig
from megatron_posttrain.data.batch import PackedBatch
from megatron_posttrain.models.architecture import Architecture
from megatron_posttrain.models.sharded import unwrap
from megatron_posttrain.platform import platform
from megatron_posttrain.training.divergence import divergence, top_k_divergence
from megatron_posttrain.training.engine import Engine
from megatron_posttrain.training.finite import anywhere
from megatron_posttrain.training.heads import Head, LabelLogprobs, OfLabels, Output, Rows, TopK
from megatron_posttrain.training.prepare import model_directory
from megatron_posttrain.training.resume import fingerprint_of_config, fingerprint_of_weights
from megatron_posttrain.training.weight_sets import HostWeights


class Teacher:
    """What a frozen model thinks of micro-batches that are looked at before the student trains on them.

    This rank has the student's columns of the vocabulary. Where the vocabularies differ in size (padding: the tokenizer
    is one) only columns that both have count.
    """

    def __init__(self, arch: Architecture, student: Engine, config: DistillConfig) -> None:
        self.arch, self.student, self.config, self.algorithm = arch, student, config, config.algorithm
        self.vocab_size = min(arch.vocab_size, student.arch.vocab_size)
        self.label_head = Common(LabelLogprobs(self.algorithm.temperature), self.vocab_size)
        self._kept: dict[tuple[int, ...], Output] = {}
        self._hidden = torch.empty(0)
        self._cache = None if config.teacher.cache is None else TopKCache.of(config, self.vocab_size)
        if self._cache is None:
            _ = self.engine  # now, while nothing else needs the memory; with a cache, once it lacks something

    @cached_property
    def engine(self) -> Engine:
        """Collective when it is first asked for."""
        model = self.config.model.model_copy(update={"path": self.config.teacher.path, "random_init": False})
        engine = Engine(self.arch, self.student.groups, model, self.config.precision)
        if engine.groups.last_stage and self.algorithm.top_k is None:
            columns = _output_weight(self.student).shape[0]
            self._weight = _columns(_output_weight(engine), columns, engine.groups.tensor)
            module: Any = unwrap(engine.modules[-1])
            module.output_layer.register_forward_hook(self._remember)
        self._host = HostWeights(engine.modules) if self.config.teacher.offload else None
        return engine

    def _remember(self, module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        self._hidden = inputs[0][:, 0]

    def _forward(self, micro_batches: Sequence[PackedBatch], head: Head) -> list[Output]:
        engine = self.engine  # which makes `_host`
        with contextlib.nullcontext() if self._host is None else self._host.present():
            return engine.forward(micro_batches, head)

    def look_at(self, micro_batches: Sequence[PackedBatch]) -> None:
        """Collective: of these micro-batches, and no longer of those before."""
        self._kept, k = {}, self.algorithm.top_k
        if k is None:
            self._forward(micro_batches, _Looking(self))
            return
        read = [self._cache.read(batch) for batch in micro_batches] if self._cache else [None]
        found = [output for output in read if output is not None]
        if anywhere(None in read):
            found = self._forward(micro_batches, Common(TopK(k, self.algorithm.temperature), self.vocab_size))
            groups = self.engine.groups
            if self._cache and groups.last_stage and groups.tensor.rank() == 0 and groups.context.rank() == 0:
                self._cache.write(micro_batches, found)
        for batch, output in zip(micro_batches, found, strict=True):
            self._kept[tuple(batch.sequence_ids)] = output

    def label_logprobs(self, micro_batches: Sequence[PackedBatch]) -> None:
        """Collective: `teacher_logprobs` of the micro-batches' labels, into their extras."""
        for batch, output in zip(micro_batches, self._forward(micro_batches, self.label_head), strict=True):
            batch.extras["teacher_logprobs"] = output["logprobs"][: len(batch.tokens)].cpu()

    def keep_hidden(self, batch: PackedBatch) -> None:
        self._kept[tuple(batch.sequence_ids)] = {"hidden": self._hidden}

    def divergence(self, logits: Tensor, rows: Rows) -> Tensor:
        """[n] of the student's logits from the teacher's, at the same tokens."""
        a, kept = self.algorithm, self._kept[tuple(rows.batch.sequence_ids)]
        options: dict[str, Any] = {"temperature": a.temperature, "vocab_size": self.vocab_size, "group": rows.tensor}
        if a.top_k is None:
            theirs = torch.nn.functional.linear(kept["hidden"], self._weight)
            return divergence(logits, theirs, a.divergence, beta=a.beta, **options)
        at = torch.as_tensor(rows.index).to(logits.device)
        tokens, logprobs = kept["tokens"][at].long(), kept["logprobs"][at]
        return top_k_divergence(logits, tokens, logprobs, a.divergence, beta=a.beta, **options)


def _output_weight(engine: Engine) -> Tensor:
    """[columns of this tensor rank, hidden] of the last stage, tied or not."""
    model: Any = unwrap(engine.modules[-1])
    return model.shared_embedding_or_output_weight() if engine.arch.tied_embeddings else model.output_layer.weight


def _columns(weight: Tensor, columns: int, group: dist.ProcessGroup) -> Tensor:
    """The teacher's rows of the columns that this rank has of the student's vocabulary; zeros where it has none."""
    if len(weight) == columns or group.size() == 1:
        whole, first = weight.detach(), 0
    else:
        parts = [torch.empty_like(weight) for _ in range(group.size())]
        dist.all_gather(parts, weight.detach().contiguous(), group=group)
        whole, first = torch.cat(parts), group.rank() * columns
    mine = whole[first : first + columns]
    return torch.cat([mine, mine.new_zeros(columns - len(mine), mine.shape[1])]) if len(mine) < columns else mine


@dataclass(frozen=True)
class _Looking(OfLabels):
    """Head of the teacher: keeps hidden states where they are."""

    teacher: Teacher
    widths: ClassVar[Mapping[str, int]] = {"seen": 0}

    def __call__(self, logits: Tensor, rows: Rows) -> Output:
        self.teacher.keep_hidden(rows.batch)
        return {"seen": logits.new_zeros(len(logits), dtype=torch.float32)}


@dataclass(frozen=True)
class Common(OfLabels):
    """Another head, among the tokens that teacher and student both have."""

    head: Head
    vocab_size: int

    @property
    def widths(self) -> Mapping[str, int]:
        return self.head.widths

    def __call__(self, logits: Tensor, rows: Rows) -> Output:
        return self.head(logits, replace(rows, vocab_size=self.vocab_size))


@dataclass(frozen=True)
class DivergenceHead(OfLabels):
    """Head of the student: `divergence` of every token whose label counts, nats."""

    teacher: Teacher
    widths: ClassVar[Mapping[str, int]] = {"divergence": 0}

    def __call__(self, logits: Tensor, rows: Rows) -> Output:
        return {"divergence": self.teacher.divergence(logits, rows)}


class TopKCache:
    """The teacher's k likeliest tokens of conversations, by their content, in a file a step and replica: int32 numbers
    and fp32 log-probs, 8 k bytes a token that counts. A directory of their own for all that they depend on."""

    def __init__(self, directory: Path, k: int, key: Mapping[str, str]) -> None:
        text = json.dumps(key, sort_keys=True)
        self.directory, self.k = directory / hashlib.sha256(text.encode()).hexdigest()[:16], k
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / "key.json").write_text(text)
        self._files: dict[str, Path] = {}  # by conversation
        self._known: set[Path] = set()

    @classmethod
    def of(cls, config: DistillConfig, vocab_size: int) -> "TopKCache":
        a, teacher, path = config.algorithm, config.teacher, model_directory(config.teacher.path, "teacher.path")
        key = {"teacher": fingerprint_of_config(path) + fingerprint_of_weights(path)}
        key |= {"precision": config.precision.fingerprint(), "vocabulary": f"{vocab_size}"}
        assert a.top_k is not None
        return cls(Path(str(teacher.cache)), a.top_k, key | {"head": f"top {a.top_k} at {a.temperature}"})

    def _names(self, batch: PackedBatch) -> list[tuple[str, Tensor]]:
        """Of every conversation, by its tokens and which of them count, and where in the micro-batch these are."""
        found = []
        for start, length in zip(batch.cu_seqlens.tolist(), batch.real_lengths, strict=False):
            tokens, at = batch.tokens[start : start + length], batch.loss_mask[start : start + length].nonzero()[:, 0]
            content = tokens.numpy().tobytes() + b"counted" + at.numpy().tobytes()
            found.append((hashlib.sha256(content).hexdigest()[:32], start + at))
        return [(name, at) for name, at in found if len(at)]

    def read(self, batch: PackedBatch) -> Output | None:
        """What `TopK` would say of the micro-batch; None where that is not known of all of it."""
        names = self._names(batch)
        if any(name not in self._files for name, _ in names):
            for file in sorted({*self.directory.glob("*.safetensors")} - self._known):
                self._known.add(file)
                with safe_open(file, "pt") as tensors:
                    self._files |= {name.partition(".")[0]: file for name in tensors.keys()}  # noqa: SIM118
        if any(name not in self._files for name, _ in names):
            return None
        output = {part: torch.zeros(len(batch.tokens), self.k) for part in ("tokens", "logprobs")}
        for name, at in names:
            with safe_open(self._files[name], "pt") as tensors:
                for part, values in output.items():
                    values[at] = tensors.get_tensor(f"{name}.{part}").float()
        return {part: values.to(platform().device) for part, values in output.items()}

    def write(self, micro_batches: Sequence[PackedBatch], outputs: Sequence[Output]) -> None:
        """A file of what is not known yet."""
        new: dict[str, Tensor] = {}
        for batch, output in zip(micro_batches, outputs, strict=True):
            for name, at in self._names(batch):
                if name not in self._files:
                    new[f"{name}.tokens"] = output["tokens"].cpu()[at].int()
                    new[f"{name}.logprobs"] = output["logprobs"].cpu()[at]
        if new:
            file = self.directory / f"{hashlib.sha256(' '.join(sorted(new)).encode()).hexdigest()[:32]}.safetensors"
            save_file(new, partial := file.with_suffix(f".partial{dist.get_rank()}"))
            partial.replace(file)
