"""Distillation: a student learns a teacher's distribution of every token, over the whole vocabulary or its likeliest
tokens, on the rows of a dataset and on answers that it samples itself (on-policy, arXiv 2306.13649).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_posttrain.algorithms.refit import Refits, token_budget
from megatron_posttrain.algorithms.sft import read_dataset
from megatron_posttrain.algorithms.teacher import DivergenceHead, Teacher
from megatron_posttrain.config.algorithms import DistillConfig
from megatron_posttrain.data.batch import PackedBatch
from megatron_posttrain.data.batch import Sequence as TokenSequence
from megatron_posttrain.data.dataset import Prompt, TokenizedDataset
from megatron_posttrain.data.tokenize import Conversation, load_tokenizer
from megatron_posttrain.errors import UserError
from megatron_posttrain.models.architecture import Architecture
from megatron_posttrain.parallel.exchange import summed
from megatron_posttrain.parallel.groups import Groups
from megatron_posttrain.platform import platform
from megatron_posttrain.rollout.engine import Sampling
from megatron_posttrain.rollout.replay import logged_file
from megatron_posttrain.rollout.samples import Samples, generate_samples, save_samples
from megatron_posttrain.training.batches import pack_share, rank_micro_batches, rank_token_batches, token_shares
from megatron_posttrain.training.engine import Engine
from megatron_posttrain.training.heads import Output
from megatron_posttrain.training.limits import rollout_problems
from megatron_posttrain.training.prepare import Prepared, check_beside, prepare
from megatron_posttrain.training.run import Run, Step
from megatron_posttrain.training.totals import Mean, per_token


def distill(config: DistillConfig) -> int:
    """Trains, resumes where a run stopped, exports. Exit status: 0, or REQUEUE_STATUS when asked to stop."""
    prepared = prepare(config)
    teacher_arch = check_teacher(config, prepared)
    dataset = read_dataset(config, prepared)
    validation = read_dataset(config, prepared, held_out=True) if config.data.validation else None
    if config.samples:
        check_sampling(config, prepared, dataset)
    with Run(prepared, dataset) as run:
        engine = run.model()
        teacher = Teacher(teacher_arch, engine, config)
        student = Student(run, Refits.of(config, run, engine)) if config.samples else None
        loss, head = divergence_loss, DivergenceHead(teacher)
        if config.algorithm.estimator == "policy_gradient":
            loss, head = reverse_kl_loss, teacher.label_head  # type: ignore[assignment]
        for step in run.steps():
            with step.phase("data"):
                batch = numbered(dataset.batch(step.index, config.training.global_batch_size))
            figures: dict[str, float | Mean] = {}
            if student is None:
                micro_batches = rank_micro_batches(batch, run.groups, config.training.micro_batch_size)
            else:
                micro_batches, figures = student.answer(step, [c for row in batch for c in row])
            with step.phase("teacher"):
                teacher.look_at(micro_batches) if loss is divergence_loss else teacher.label_logprobs(micro_batches)
            with step.phase("train"):
                result = engine.train_step(micro_batches, loss, per_token, step.learning_rate, head)
            figures = {"tokens": sum(len(c.token_ids) for row in batch for c in row)} | figures
            figures["loss_tokens"] = result.totals.tokens
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


def check_sampling(config: DistillConfig, prepared: Prepared, dataset: TokenizedDataset) -> None:
    """Raises UserError where vLLM cannot run the student, or no conversation leaves room for an answer of it."""
    if wrong := list(rollout_problems(config, prepared.arch, platform().name)):
        raise UserError("; ".join(wrong))
    shortest = min(int(source.first.min()) for source in dataset.sources)
    longest, length = config.rollout.at(None).max_tokens, config.data.sequence_length
    if shortest + longest > length:
        raise UserError(
            f"rollout.max_tokens={longest} leaves no room in data.sequence_length={length} for any prompt; the "
            f"shortest has {shortest} tokens"
        )


def numbered(rows: Sequence[Sequence[Conversation]]) -> list[list[TokenSequence]]:
    """Every conversation of a step with a number of its own, by which its micro-batch is known."""
    found, count = [], 0
    for row in rows:
        found.append([TokenSequence(c.token_ids, c.loss_mask, index=count + i) for i, c in enumerate(row)])
        count += len(row)
    return found


@dataclass
class Student:
    """Answers the last turns of a share of a step's conversations."""

    run: Run
    refits: Refits

    def answer(self, step: Step, rows: list[TokenSequence]) -> tuple[list[PackedBatch], dict[str, float | Mean]]:
        """Collective: this rank's micro-batches of the step's conversations, and what is logged."""
        config = self.run.config.at(step.index)
        assert isinstance(config, DistillConfig)
        prompts = asked(rows, config, step.index)
        (engine,), budget = self.refits.trained, token_budget(config)
        groups, arch = engine.groups, engine.arch
        if not prompts:
            return rank_token_batches(rows, groups, arch, budget), {"sampled_fraction": 0.0}
        with step.phase("refit"):
            moved = self.refits.update(config, prompts, step.index)
        with step.phase("rollout"):
            sampling = Sampling(1, config.rollout.max_tokens, config.rollout.temperature)
            seeds = np.random.SeedSequence([config.training.seed, step.index]).generate_state(len(prompts), np.uint32)
            rollout, tokenizer = self.refits.rollout, self.run.prepared.tokenizer
            samples = generate_samples(rollout, tokenizer, prompts, [], sampling, (seeds >> 1).tolist())
            rollout.sleep()
        samples.advantages = torch.zeros(len(prompts))
        micro_batches = answered_batches(rows, samples, groups, arch, budget)
        save_samples(logged_file(self.run.directory / "rollouts", step.number), samples)
        figures = samples.metrics() | moved
        names = ("response_length", "truncated_fraction", *moved)
        told: dict[str, float | Mean] = {name: figures[name] for name in names}
        answered = {p.index for p in prompts}
        kept = sum(len(row.token_ids) for row in rows if row.index not in answered)
        return micro_batches, told | {"sampled_fraction": len(prompts) / len(rows), "tokens": kept + samples.tokens}


def answered_batches(
    rows: list[TokenSequence], samples: Samples, groups: Groups, arch: Architecture, budget: int
) -> list[PackedBatch]:
    """Collective: this rank's micro-batches of at most `budget` tokens, for answers have other lengths than the rows
    had."""
    place = {prompt.index: number for number, prompt in enumerate(samples.prompts)}
    totals = samples.total_lengths
    lengths = [totals[place[i]] if i in place else len(row.token_ids) for i, row in enumerate(rows)]
    shares, rank = token_shares(lengths, groups.layout, arch, budget), groups.data.rank()
    received = samples.receive([[place[i] for batch in share for i in batch if i in place] for share in shares], rank)

    def sequence(i: int) -> TokenSequence:
        return replace(received(place[i]), index=i, extras={}) if i in place else rows[i]

    return pack_share(shares[rank], sequence, groups.layout)


def asked(rows: Sequence[TokenSequence], config: DistillConfig, step: int) -> list[Prompt]:
    """What comes before the last turn that counts, of `student_fraction` of the conversations, drawn by seed and step
    among those in which it leaves room for an answer."""
    room = config.data.sequence_length - config.rollout.max_tokens
    found: list[Prompt] = []
    for i in np.random.default_rng([config.training.seed, step]).permutation(len(rows)).tolist():
        counted = np.flatnonzero(rows[i].loss_mask)
        begin = int(counted[np.flatnonzero(np.diff(counted, prepend=-2) > 1)[-1]]) if len(counted) else 0
        if 0 < begin <= room and len(found) < round(config.algorithm.student_fraction * len(rows)):
            found.append(Prompt(i, rows[i].token_ids[:begin].tolist(), None, {}, []))
    return sorted(found, key=lambda prompt: prompt.index)


def divergence_loss(output: Output, batch: PackedBatch) -> tuple[Tensor, dict[str, Mean]]:
    return output["divergence"] * batch.loss_mask, {}


def reverse_kl_loss(output: Output, batch: PackedBatch) -> tuple[Tensor, dict[str, Mean]]:
    """Of tokens that the student drew: log q - log p, whose mean is KL(student || teacher), and whose gradient is that
    of a policy with the advantage log p - log q of every token (arXiv 2306.08543, eq. 2, without the tokens after
    it)."""
    logprobs = output["logprobs"]
    difference = (logprobs - batch.extras["teacher_logprobs"]).detach()
    return difference * (1 + logprobs - logprobs.detach()) * batch.loss_mask, {}


def validation_divergence(engine: Engine, teacher: Teacher, dataset: TokenizedDataset) -> Mean:
    """Over the tokens of the whole set that count."""
    (sequences,) = numbered([[dataset[i] for i in range(len(dataset))]])
    batches = rank_token_batches(sequences, engine.groups, engine.arch, dataset.sequence_length)
    teacher.look_at(batches)
    found = torch.zeros(2, dtype=torch.float64)
    for batch, output in zip(batches, engine.forward(batches, DivergenceHead(teacher)), strict=True):
        values = output["divergence"][: len(batch.tokens)].cpu() * batch.loss_mask
        found += torch.stack([values.double().sum(), batch.loss_mask.double().sum()])
    return Mean(*summed(found, engine.groups.data).tolist())
