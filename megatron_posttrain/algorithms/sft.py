"""Supervised fine-tuning: cross-entropy on assistant tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_posttrain.algorithms.losses import cross_entropy_sum
from megatron_posttrain.config.schema import SftConfig
from megatron_posttrain.data.batch import PackedBatch
from megatron_posttrain.data.batch import Sequence as TokenSequence
from megatron_posttrain.data.dataset import SftDataset
from megatron_posttrain.data.rows import read_rows
from megatron_posttrain.parallel.groups import make_groups, start_distributed
from megatron_posttrain.training.batches import rank_micro_batches
from megatron_posttrain.training.checkpoints import Checkpoints
from megatron_posttrain.training.engine import Engine, Metrics, TokenOutput
from megatron_posttrain.training.export import export_run
from megatron_posttrain.training.limits import check_positions
from megatron_posttrain.training.prepare import Prepared, prepare
from megatron_posttrain.training.resume import Origin
from megatron_posttrain.training.run import REQUEUE_STATUS, Run
from megatron_posttrain.training.schedule import learning_rate, total_steps
from megatron_posttrain.training.sequences import sequence_logprobs
from megatron_posttrain.training.timing import PhaseTimer


def sft(config: SftConfig) -> int:
    """Trains, resumes where a run stopped, exports. Exit status: 0, or REQUEUE_STATUS when asked to stop."""
    prepared = prepare(config)
    dataset = read_dataset(config, prepared, config.data.train)
    validation = read_dataset(config, prepared, config.data.validation) if config.data.validation else None
    steps = total_steps(config.training, dataset, config.training.global_batch_size)
    origin = Origin.of(config, prepared.model_path, dataset.fingerprint)
    checkpoints = Checkpoints(config.output_dir, config.checkpoint, origin)
    start_distributed()
    groups = make_groups(prepared.layout, config.training.seed)
    engine = Engine(config, prepared.arch, groups)
    first = checkpoints.resume(engine)

    with Run(config, steps, first) as run:
        run.say(f"{dataset.message}; {steps} steps on {prepared.layout}")
        for step in range(first, steps):
            timer = PhaseTimer()
            with timer("data"):
                batch = dataset.batch(step, config.training.global_batch_size)
                rows = [[TokenSequence(c.token_ids, c.loss_mask) for c in row] for row in batch]
                counted = sum(sum(c.loss_mask) for row in batch for c in row)
                tokens = sum(len(c.token_ids) for row in batch for c in row)
                micro_batches = rank_micro_batches(rows, groups, config.training.micro_batch_size)

            def loss_function(
                output: TokenOutput, batch: PackedBatch, counted: int = counted
            ) -> tuple[Tensor, Metrics]:
                # One mean over all tokens of the global batch, whatever rank and micro-batch they are in.
                return cross_entropy_sum(output.logprobs, batch.loss_mask) / counted, {}

            lr = learning_rate(config.optimizer, step, steps)
            with timer("train"):
                result = engine.train_step(micro_batches, loss_function, lr)
            seconds = timer.total()
            last = step + 1 == steps
            due = checkpoints.due(step + 1, last)
            extra = {"validation_loss": validation_loss(engine, validation)} if validation and (due or last) else {}
            run.log(
                step + 1,
                {
                    "loss": result.loss,
                    "grad_norm": result.grad_norm,
                    "learning_rate": lr,
                    "tokens": tokens,
                    "loss_tokens": counted,
                    "tokens_per_second": tokens / seconds,
                    "step_seconds": seconds,
                    "data_seconds": timer.seconds["data"],
                }
                | {f"{phase}_seconds": value for phase, value in result.seconds.items()}
                | result.metrics
                | extra,
            )
            if checkpoints.after_step(engine, run, step + 1):
                return REQUEUE_STATUS
        export_run(engine, checkpoints, run, prepared.model_path)
    return 0


def read_dataset(config: SftConfig, prepared: Prepared, source: str | list[str]) -> SftDataset:
    data = config.data
    dataset = SftDataset(
        read_rows(source, require_assistant=True, columns=data.columns),
        prepared.tokenizer,
        data.sequence_length,
        packing=data.packing,
        overlong=data.overlong,
        seed=config.training.seed,
        omissions=data.omissions,
    )
    check_positions(dataset.lengths, prepared.arch)
    return dataset


def validation_loss(engine: Engine, dataset: SftDataset) -> float:
    """Mean of -log p over the tokens of the whole set that count."""
    sequences = [TokenSequence(c.token_ids, c.loss_mask) for c in map(dataset.__getitem__, range(len(dataset)))]
    logprobs = sequence_logprobs(engine, sequences, dataset.sequence_length)
    masks = [torch.tensor(s.loss_mask[1:]) for s in sequences]
    total = sum(float(cross_entropy_sum(x, mask)) for x, mask in zip(logprobs, masks, strict=True))
    return total / sum(int(mask.sum()) for mask in masks)
