"""Direct preference optimization and its relatives, on pairs; KTO, on labelled answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_posttrain.algorithms.preference_losses import dpo_terms, kto_terms
from megatron_posttrain.algorithms.preferences import (
    answer_logprobs,
    means,
    read_preferences,
    score_sequences,
    sequence_sums,
    sequences_of,
    sides,
    token_budget,
    unit_batches,
)
from megatron_posttrain.config.algorithms import WITHOUT_REFERENCE, DpoAlgorithm, DpoConfig
from megatron_posttrain.data.batch import PackedBatch
from megatron_posttrain.data.pairs import Preference, PreferenceDataset
from megatron_posttrain.errors import UserError
from megatron_posttrain.parallel.groups import broadcast_object
from megatron_posttrain.training.engine import LABEL_LOGPROBS, Engine, StepResult
from megatron_posttrain.training.heads import Output
from megatron_posttrain.training.prepare import Prepared, prepare
from megatron_posttrain.training.resume import fingerprint_of_config, fingerprint_of_weights
from megatron_posttrain.training.run import Run
from megatron_posttrain.training.totals import Mean, per_sequence, per_unit

REFERENCE = "reference"  # the weight set
ROWS_AT_A_TIME = 1024


def dpo(config: DpoConfig) -> int:
    """Trains, resumes where a run stopped, exports. Exit status: 0, or REQUEUE_STATUS when asked to stop."""
    prepared = prepare(config)
    labelled = config.algorithm.loss == "kto"
    dataset = read_preferences(prepared, config.data.sources, labelled=labelled)
    held_out = read_preferences(prepared, config.data.validation, labelled=labelled) if config.data.validation else None
    directory = Path(config.algorithm.reference_cache or config.output_dir / "reference")
    reference = ReferenceLogprobs(directory / "train.npz", prepared, dataset)
    of_held_out = ReferenceLogprobs(directory / "validation.npz", prepared, held_out) if held_out else None
    update = kto_step if labelled else pair_step
    with Run(prepared, dataset) as run:
        engine = model_with_reference(run, [reference, of_held_out] if of_held_out else [reference])
        for step in run.steps():
            rows = dataset.batch(step.index, config.training.global_batch_size)
            batch = [dataset.preferences[row] for row in rows]
            with step.phase("train"):
                result = update(engine, config, batch, reference.values[rows], step.learning_rate)
            figures: dict[str, float | Mean] = {"tokens": sum(x.tokens for x in batch)}
            if of_held_out is not None and step.validates:
                with step.phase("validation", apart=True):
                    figures |= validate(engine, config, of_held_out)
            step.log(result.figures(), figures)
    return run.status


def model_with_reference(run: Run, references: list[ReferenceLogprobs]) -> Engine:
    """The model, and what the run will ask of the reference: of a resumed run all of it is on disk."""
    config = run.config
    assert isinstance(config, DpoConfig)
    if config.algorithm.loss in WITHOUT_REFERENCE:
        return run.model()
    size = config.training.global_batch_size
    train = {row for step in range(run.total_steps) for row in references[0].dataset.batch(step, size)}
    missing = [ref.missing(train if ref is references[0] else range(len(ref.dataset))) for ref in references]
    engine = run.model(keep=REFERENCE if any(missing) else None)
    for ref, rows in zip(references, missing, strict=True):
        if rows:
            with engine.weights(REFERENCE):
                ref.compute(engine, rows, run)
    if any(missing):
        engine.weight_sets.drop(REFERENCE)
    return engine


class ReferenceLogprobs:
    """The reference model's log-probs of every conversation of a dataset, summed over its answer: computed once with
    the weights that a run begins with, and kept on disk. `values`: [rows, 2], NaN where nothing asked for it yet.

    Raises UserError where the file has those of another model, tokenizer, template, truncation or other rows.
    """

    def __init__(self, file: Path, prepared: Prepared, dataset: PreferenceDataset) -> None:
        self.file, self.dataset = file, dataset
        self.key = cache_key(prepared, dataset)
        self.values = torch.full((len(dataset), 2), torch.nan)
        if not file.exists():
            return
        with np.load(file) as stored:
            key, self.values = json.loads(str(stored["key"])), torch.from_numpy(stored["values"])
        if wrong := [name for name, value in self.key.items() if key.get(name) != value]:
            raise UserError(
                f"{file} has log-probs for another {', '.join(wrong)} than this run's; remove it, or give this run a "
                "directory of its own in algorithm.reference_cache"
            )

    def missing(self, rows: Iterable[int]) -> list[int]:
        """Collective: the rows that are not known, as rank 0 sees its file."""
        self.values = torch.as_tensor(broadcast_object(self.values.numpy()))
        unknown = self.values.isnan().any(-1).tolist()
        return sorted({row for row in rows if unknown[row]})

    def compute(self, engine: Engine, rows: list[int], run: Run) -> None:
        """Collective: those of `rows`, under the present weights of `engine`; written by rank 0."""
        budget = token_budget(run.config)
        for start in range(0, len(rows), ROWS_AT_A_TIME):
            part = rows[start : start + ROWS_AT_A_TIME]
            units = sequences_of([self.dataset.preferences[row] for row in part])
            found = score_sequences(engine, units, budget, LABEL_LOGPROBS, answer_logprobs)
            self.values[part] = found.view(-1, 2)
            run.say(f"reference log-probs of {start + len(part):,} of {len(rows):,} rows")
        if run.is_main:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            partial = self.file.with_name(f".{self.file.name}.partial.npz")
            np.savez(partial, key=json.dumps(self.key), values=self.values.numpy())
            partial.replace(self.file)


def cache_key(prepared: Prepared, dataset: PreferenceDataset) -> dict[str, str]:
    """All that the log-probs depend on, by the names that a message gives."""
    config = prepared.config

    def short(text: str) -> str:
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    seed, path = config.training.seed, prepared.model_path
    weights = f" random {seed}" if config.model.random_init else fingerprint_of_weights(path)
    return {
        "model": fingerprint_of_config(path) + weights,
        "precision": config.precision.fingerprint(),
        "tokenizer": short(prepared.tokenizer.backend_tokenizer.to_str()),
        "template": short(str(prepared.tokenizer.chat_template)),
        "truncation": f"{config.data.sequence_length} {config.data.overlong}",
        "rows": dataset.fingerprint,  # tokens, and which of them count
    }


def pair_step(engine: Engine, config: DpoConfig, batch: list[Preference], reference: Tensor, lr: float) -> StepResult:
    batches = unit_batches(sequences_of(batch), engine, config)
    return engine.train_step(batches, partial(pair_loss, config.algorithm, reference), per_unit, lr)


def pair_loss(
    algorithm: DpoAlgorithm, reference: Tensor, output: Output, batch: PackedBatch
) -> tuple[Tensor, dict[str, Mean]]:
    """A term for every pair of the micro-batch; `reference`: [pairs of the global batch, 2]."""
    first, second, numbers = sides(batch)
    logprobs, lengths = answer_logprobs(output, batch), sequence_sums(batch.loss_mask, batch)
    terms, metrics = pair_terms(
        algorithm,
        torch.stack([logprobs[first], logprobs[second]]),
        torch.stack([lengths[first], lengths[second]]),
        reference[numbers].T.to(logprobs.device),
    )
    return terms, means(metrics)


def pair_terms(
    algorithm: DpoAlgorithm, logprobs: Tensor, lengths: Tensor, reference: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Of [2, pairs] log-probs of the chosen and the rejected answers."""
    terms, metrics = dpo_terms(
        *logprobs,
        *reference,
        beta=algorithm.beta,
        label_smoothing=algorithm.label_smoothing,
        loss=algorithm.loss,
        chosen_lengths=lengths[0],
        rejected_lengths=lengths[1],
        length_normalized=algorithm.length_normalized,
        gamma=algorithm.gamma,
    )
    if algorithm.sft_weight:
        terms = terms - algorithm.sft_weight * logprobs[0] / lengths[0]  # RPO (arXiv 2404.19733, eq. 1)
    return terms, metrics


def kto_step(engine: Engine, config: DpoConfig, batch: list[Preference], reference: Tensor, lr: float) -> StepResult:
    """First the divergence of the policy from the reference, on answers to other prompts, without gradient."""
    units, budget = sequences_of(batch), token_budget(config)
    mismatched = score_sequences(engine, [unit[1:] for unit in units], budget, LABEL_LOGPROBS, answer_logprobs)
    divergence = float((mismatched - reference[:, 1]).mean())
    labels = torch.tensor([float(bool(found.label)) for found in batch])
    batches = unit_batches([unit[:1] for unit in units], engine, config)
    loss = partial(kto_loss, config.algorithm.beta, reference[:, 0], labels, divergence)
    result = engine.train_step(batches, loss, per_sequence, lr)
    result.metrics["kl"] = Mean(max(divergence, 0.0), 1)
    rewards = [result.metrics[name].value for name in ("chosen_reward", "rejected_reward")]
    result.metrics["margin"] = Mean(rewards[0] - rewards[1], 1)
    return result


def kto_loss(
    beta: float, reference: Tensor, labels: Tensor, divergence: float, output: Output, batch: PackedBatch
) -> tuple[Tensor, dict[str, Mean]]:
    """A term for every answer of the micro-batch; `reference`, `labels`: [answers of the global batch]."""
    at = [unit[0] for unit in batch.units]
    numbers = [batch.sequence_ids[place] // 2 for place in at]
    logprobs = answer_logprobs(output, batch)[at]
    of_batch, good = reference[numbers].to(logprobs.device), labels[numbers].to(logprobs.device)
    terms, metrics = labelled_terms(beta, logprobs, of_batch, good, divergence)
    return terms, metrics


def labelled_terms(
    beta: float, logprobs: Tensor, reference: Tensor, labels: Tensor, divergence: float
) -> tuple[Tensor, dict[str, Mean]]:
    """`accuracy`: how often a good answer's reward is above the divergence's, a bad one's below."""
    terms, rewards = kto_terms(logprobs - reference, labels, divergence, beta=beta)
    right = (rewards > beta * max(divergence, 0.0)) == (labels > 0)
    bad = 1 - labels
    return terms, {
        "accuracy": Mean(right.sum(), len(labels)),
        "chosen_reward": Mean((rewards * labels).sum(), labels.sum()),
        "rejected_reward": Mean((rewards * bad).sum(), bad.sum()),
        "chosen_logprobs": Mean((logprobs.detach() * labels).sum(), labels.sum()),
        "rejected_logprobs": Mean((logprobs.detach() * bad).sum(), bad.sum()),
    }


def validate(engine: Engine, config: DpoConfig, reference: ReferenceLogprobs) -> dict[str, Mean]:
    """Loss and metrics of the whole set under the present weights, named validation_*."""
    preferences = reference.dataset.preferences
    units, budget = sequences_of(preferences), token_budget(config)
    logprobs = score_sequences(engine, units, budget, LABEL_LOGPROBS, answer_logprobs).view(-1, 2)
    if config.algorithm.loss == "kto":
        labels = torch.tensor([float(bool(found.label)) for found in preferences])
        divergence = float((logprobs - reference.values)[:, 1].mean())
        terms, metrics = labelled_terms(
            config.algorithm.beta, logprobs[:, 0], reference.values[:, 0], labels, divergence
        )
    else:
        lengths = torch.tensor([[float(mask[1:].sum()) for _, mask in x.conversations] for x in preferences])
        terms, found = pair_terms(config.algorithm, logprobs.T, lengths.T, reference.values.T)
        metrics = means(found)
    return {f"validation_{name}": value for name, value in {"loss": Mean(terms.sum(), len(terms)), **metrics}.items()}
