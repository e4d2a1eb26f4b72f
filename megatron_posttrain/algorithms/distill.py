"""Distillation: a student learns a teacher's distribution of every token, over the whole vocabulary or its likeliest
tokens, on the rows of a dataset.

The teacher is a frozen model in the student's layout, of any size. Of a step it leaves its last hidden states, hidden
size x 2 bytes a token in bf16; its logits are made one micro-batch at a time, when the student's are there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_posttrain.algorithms.sft import read_dataset
from megatron_posttrain.config.algorithms import DistillAlgorithm, DistillConfig
from megatron_posttrain.data.batch import PackedBatch
from megatron_posttrain.data.batch import Sequence as TokenSequence
from megatron_posttrain.data.dataset import TokenizedDataset
from megatron_posttrain.data.tokenize import Conversation, load_tokenizer
from megatron_posttrain.errors import UserError
from megatron_posttrain.models.architecture import Architecture
from megatron_posttrain.models.sharded import unwrap
from megatron_posttrain.platform import platform
from megatron_posttrain.training.batches import rank_micro_batches, rank_token_batches
from megatron_posttrain.training.divergence import divergence, top_k_divergence
from megatron_posttrain.training.engine import Engine
from megatron_posttrain.training.heads import OfLabels, Output, Rows, TopK
from megatron_posttrain.training.prepare import Prepared, check_beside, prepare
from megatron_posttrain.training.run import Run
from megatron_posttrain.training.totals import Mean, per_token


def distill(config: DistillConfig) -> int:
    """Trains, resumes where a run stopped, exports. Exit status: 0, or REQUEUE_STATUS when asked to stop."""
    prepared = prepare(config)
    teacher_arch = check_teacher(config, prepared)
    dataset = read_dataset(config, prepared)
    validation = read_dataset(config, prepared, held_out=True) if config.data.validation else None
    with Run(prepared, dataset) as run:
        engine = run.model()
        own = config.model.model_copy(update={"path": config.teacher.path, "random_init": False})
        teacher = Teacher(Engine(teacher_arch, run.groups, own, config.precision), engine, config.algorithm)
        for step in run.steps():
            with step.phase("data"):
                batch = dataset.batch(step.index, config.training.global_batch_size)
                micro_batches = rank_micro_batches(numbered(batch), run.groups, config.training.micro_batch_size)
            with step.phase("teacher"):
                teacher.look_at(micro_batches)
            with step.phase("train"):
                result = engine.train_step(
                    micro_batches, divergence_loss, per_token, step.learning_rate, DivergenceHead(teacher)
                )
            figures: dict[str, float | Mean] = {
                "tokens": sum(len(c.token_ids) for row in batch for c in row),
                "loss_tokens": result.totals.tokens,
            }
            if validation is not None and step.validates:
                with step.phase("validation", apart=True):
                    figures["validation_loss"] = validation_divergence(engine, teacher, validation)
            step.log(result.figures(), figures)
    return run.status


def check_teacher(config: DistillConfig, prepared: Prepared) -> Architecture:
    """Of a teacher that can be run in the student's layout and has its tokenizer. Raises UserError."""
    path, arch = check_beside("teacher.path", config.teacher.path, prepared.layout)
    if arch.scalar_head:
        raise UserError(f"teacher.path={path} is a reward model; a teacher needs an output layer of tokens")
    check_tokenizers(path, load_tokenizer(path), prepared.tokenizer)
    return arch


def check_tokenizers(path: Path, teachers: Any, students: Any) -> None:
    """Raises UserError for the first token number that means another token to the teacher."""
    theirs, ours = ({number: token for token, number in t.get_vocab().items()} for t in (teachers, students))
    different = [number for number in sorted(theirs.keys() | ours.keys()) if theirs.get(number) != ours.get(number)]
    if different:
        first = different[0]
        raise UserError(
            f"teacher.path={path} has another tokenizer: token {first} is {theirs.get(first)!r} there and "
            f"{ours.get(first)!r} for the student ({len(different):,} tokens differ); allowed: a teacher with the "
            "student's tokenizer"
        )


def numbered(rows: Sequence[Sequence[Conversation]]) -> list[list[TokenSequence]]:
    """Every conversation of a step with a number of its own, by which its micro-batch is known."""
    found, count = [], 0
    for row in rows:
        found.append([TokenSequence(c.token_ids, c.loss_mask, index=count + i) for i, c in enumerate(row)])
        count += len(row)
    return found


class Teacher:
    """What a frozen model thinks of micro-batches that are looked at before the student trains on them.

    Args:
        student: whose columns of the vocabulary this rank has. Where the vocabularies differ in size (padding: the
            tokenizer is one) only columns that both have count.
    """

    def __init__(self, engine: Engine, student: Engine, algorithm: DistillAlgorithm) -> None:
        self.engine, self.algorithm = engine, algorithm
        self.vocab_size = min(engine.arch.vocab_size, student.arch.vocab_size)
        self._kept: dict[tuple[int, ...], Output] = {}
        self._hidden = torch.empty(0)
        if engine.groups.last_stage and algorithm.top_k is None:
            columns = _output_weight(student).shape[0]
            self._weight = _columns(_output_weight(engine), columns, engine.groups.tensor)
            model: Any = unwrap(engine.modules[-1])
            model.output_layer.register_forward_hook(self._remember)

    def _remember(self, module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        self._hidden = inputs[0][:, 0]

    def look_at(self, micro_batches: Sequence[PackedBatch]) -> None:
        """Collective: of these micro-batches, and no longer of those before."""
        self._kept = {}
        if self.algorithm.top_k is None:
            self.engine.forward(micro_batches, _Looking(self))
            return
        head = _Likeliest(self.algorithm.top_k, self.algorithm.temperature, self.vocab_size)
        for batch, output in zip(micro_batches, self.engine.forward(micro_batches, head), strict=True):
            self._kept[tuple(batch.sequence_ids)] = output

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
class _Likeliest(TopK):
    """Head of the teacher: its likeliest tokens among those that the student has, too."""

    vocab_size: int = 0

    def __call__(self, logits: Tensor, rows: Rows) -> Output:
        return super().__call__(logits, replace(rows, vocab_size=self.vocab_size))


@dataclass(frozen=True)
class DivergenceHead(OfLabels):
    """Head of the student: `divergence` of every token whose label counts, nats."""

    teacher: Teacher
    widths: ClassVar[Mapping[str, int]] = {"divergence": 0}

    def __call__(self, logits: Tensor, rows: Rows) -> Output:
        return {"divergence": self.teacher.divergence(logits, rows)}


def divergence_loss(output: Output, batch: PackedBatch) -> tuple[Tensor, dict[str, Mean]]:
    return output["divergence"] * batch.loss_mask, {}


def validation_divergence(engine: Engine, teacher: Teacher, dataset: TokenizedDataset) -> Mean:
    """Over the tokens of the whole set that count."""
    (sequences,) = numbered([[dataset[i] for i in range(len(dataset))]])
    batches = rank_token_batches(sequences, engine.groups, engine.arch, dataset.sequence_length)
    teacher.look_at(batches)
    found = torch.zeros(2, dtype=torch.float64)
    for batch, output in zip(batches, engine.forward(batches, DivergenceHead(teacher)), strict=True):
        values = output["divergence"][: len(batch.tokens)].cpu() * batch.loss_mask
        found += torch.stack([values.double().sum(), batch.loss_mask.double().sum()])
    found = found.to(platform().device)
    dist.all_reduce(found, group=engine.groups.data)
    return Mean(*found.tolist())
