"""Supervised fine-tuning: cross-entropy on assistant tokens."""

from functools import partial

import torch

from megatron_posttrain.algorithms.losses import cross_entropy, cross_entropy_terms
from megatron_posttrain.config.algorithms import SftConfig
from megatron_posttrain.config.schema import Config
from megatron_posttrain.data.batch import Sequence as TokenSequence
from megatron_posttrain.data.dataset import TokenizedDataset, read_conversations
from megatron_posttrain.training.batches import rank_micro_batches
from megatron_posttrain.training.engine import Engine
from megatron_posttrain.training.heads import LabelLogprobs
from megatron_posttrain.training.limits import check_positions
from megatron_posttrain.training.prepare import Prepared, prepare
from megatron_posttrain.training.run import Run
from megatron_posttrain.training.sequences import sequence_logprobs
from megatron_posttrain.training.totals import per_token


def sft(config: SftConfig) -> int:
    """Trains, resumes where a run stopped, exports. Exit status: 0, or REQUEUE_STATUS when asked to stop."""
    prepared = prepare(config)
    dataset = read_dataset(config, prepared)
    validation = read_dataset(config, prepared, held_out=True) if config.data.validation else None
    with Run(prepared, dataset) as run:
        engine, z_loss = run.model(), config.algorithm.z_loss
        loss, head = partial(cross_entropy, z_loss=z_loss), LabelLogprobs(normalisers=bool(z_loss))
        for step in run.steps():
            with step.phase("data"):
                batch = dataset.batch(step.index, config.training.global_batch_size)
                rows = [[TokenSequence(c.token_ids, c.loss_mask) for c in row] for row in batch]
                micro_batches = rank_micro_batches(rows, run.groups, config.training.micro_batch_size)
            with step.phase("train"):
                result = engine.train_step(micro_batches, loss, per_token, step.learning_rate, head)
            figures: dict[str, float] = {
                "tokens": sum(len(c.token_ids) for row in batch for c in row),
                "loss_tokens": result.totals.tokens,
            }
            if validation is not None and step.validates:
                with step.phase("validation", apart=True):
                    figures["validation_loss"] = validation_loss(engine, validation)
            step.log(result.figures(), figures)
    return run.status


def read_dataset(config: Config, prepared: Prepared, held_out: bool = False) -> TokenizedDataset:
    """The conversations that are trained on, or those of `data.validation`."""
    dataset = read_conversations(config, prepared.tokenizer, config.cache_dir, held_out)
    check_positions(dataset.lengths, prepared.arch)
    return dataset


def validation_loss(engine: Engine, dataset: TokenizedDataset) -> float:
    """Mean of -log p over the tokens of the whole set that count, by weight."""
    sequences = [TokenSequence(c.token_ids, c.loss_mask) for c in map(dataset.__getitem__, range(len(dataset)))]
    logprobs = sequence_logprobs(engine, sequences, dataset.sequence_length)
    masks = [torch.tensor(s.loss_mask[1:]) for s in sequences]
    total = sum(float(cross_entropy_terms(x, mask).sum()) for x, mask in zip(logprobs, masks, strict=True))
    return total / sum(float(mask.double().sum()) for mask in masks)
