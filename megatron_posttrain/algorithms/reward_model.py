"""Reward models: a scalar at the last token of a conversation, trained on pairs (Bradley-Terry)."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_posttrain.algorithms.preference_losses import reward_model_terms
from megatron_posttrain.algorithms.preferences import (
    last_values,
    means,
    read_preferences,
    score_sequences,
    sequences_of,
    sides,
    token_budget,
    unit_batches,
)
from megatron_posttrain.checkpoint.hf_files import read_json, write_json
from megatron_posttrain.config.algorithms import RewardModelConfig
from megatron_posttrain.data.batch import PackedBatch
from megatron_posttrain.data.pairs import PreferenceDataset
from megatron_posttrain.training.engine import Engine
from megatron_posttrain.training.heads import Output, Scalars
from megatron_posttrain.training.prepare import prepare
from megatron_posttrain.training.run import Run
from megatron_posttrain.training.totals import Mean, per_unit

HEAD = Scalars(last=True)


def reward_model(config: RewardModelConfig) -> int:
    """Trains, resumes where a run stopped, exports. Exit status: 0, or REQUEUE_STATUS when asked to stop."""
    prepared = prepare(config)
    prepared = replace(prepared, arch=prepared.arch.with_scalar_head())
    dataset = read_preferences(prepared, config.data.sources)
    held_out = read_preferences(prepared, config.data.validation) if config.data.validation else None
    with Run(prepared, dataset) as run:
        engine = run.model()
        for step in run.steps():
            with step.phase("data"):
                rows = dataset.batch(step.index, config.training.global_batch_size)
                batch = [dataset.preferences[row] for row in rows]
                batches = unit_batches(sequences_of(batch), engine, config)
            with step.phase("train"):
                loss = partial(pair_loss, config.algorithm.center, torch.tensor([found.margin for found in batch]))
                result = engine.train_step(batches, loss, per_unit, step.learning_rate, HEAD)
            figures: dict[str, float | Mean] = {"tokens": sum(x.tokens for x in batch)}
            if held_out is not None and step.validates:
                with step.phase("validation", apart=True):
                    figures |= validate(engine, config, held_out)
            step.log(result.figures(), figures)
        if run.is_main and not run.status:
            ends = {int(tokens[-1]) for found in dataset.preferences for tokens, _ in found.conversations}
            if not name_padding(run.directory / "hf" / "config.json", prepared.tokenizer.pad_token_id, ends):
                run.say("conversations end with the padding token: transformers can score only one at a time with hf/")
    return run.status


def name_padding(file: Path, token: int | None, ends: set[int]) -> bool:
    """transformers finds a conversation's last token by the padding behind it: that has to be what the tokenizer pads
    with. Where conversations end with it too, transformers would take the token before it: False, and the model has no
    padding token, so that batches are refused and single conversations are scored as here."""
    config = read_json(file)
    before = config.get("pad_token_id")
    wanted = before if token is None else token
    named = wanted is None or wanted not in ends
    if before != (wanted if named else None):
        write_json(file, config | {"pad_token_id": wanted if named else None})
    return named


def pair_loss(center: float, margins: Tensor, output: Output, batch: PackedBatch) -> tuple[Tensor, dict[str, Mean]]:
    """A term for every pair of the micro-batch; `margins`: [pairs of the global batch]."""
    first, second, numbers = sides(batch)
    rewards = last_values(output, batch)
    margin = margins[numbers].to(rewards.device)
    terms, metrics = reward_model_terms(rewards[first], rewards[second], margin=margin, center=center)
    return terms, means(metrics)


def validate(engine: Engine, config: RewardModelConfig, dataset: PreferenceDataset) -> dict[str, Mean]:
    """Loss and metrics of the whole set under the present weights, named validation_*."""
    units = sequences_of(dataset.preferences)
    rewards = score_sequences(engine, units, token_budget(config), HEAD, last_values).view(-1, 2)
    margin = torch.tensor([found.margin for found in dataset.preferences])
    terms, metrics = reward_model_terms(*rewards.T, margin=margin, center=config.algorithm.center)
    return {f"validation_{name}": value for name, value in means({"loss": terms, **metrics}).items()}
