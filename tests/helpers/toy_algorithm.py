"""An algorithm from outside the package: this file, and a row of the table (`-m tests.helpers.toy_algorithm toy`)."""

from __future__ import annotations

import sys

from pydantic import Field
from torch import Tensor

from megatron_posttrain.algorithms.sft import read_dataset
from megatron_posttrain.cli.main import main
from megatron_posttrain.config.algorithms import ALGORITHMS, Algorithm, SftConfig
from megatron_posttrain.config.schema import Section
from megatron_posttrain.data.batch import PackedBatch, Sequence
from megatron_posttrain.training.batches import rank_micro_batches
from megatron_posttrain.training.heads import Output
from megatron_posttrain.training.prepare import prepare
from megatron_posttrain.training.run import Run
from megatron_posttrain.training.totals import Mean, per_sequence


class ToyAlgorithm(Section):
    power: float = Field(0.5, description="weight of a token is (1 - p) ** power")


class ToyConfig(SftConfig):
    command = "toy"
    algorithm: ToyAlgorithm = Field(default_factory=ToyAlgorithm)  # type: ignore[assignment]


def toy(config: ToyConfig) -> int:
    """A focal loss (arXiv 1708.02002), a mean over sequences."""
    prepared = prepare(config)
    dataset = read_dataset(config, prepared)

    def focal(output: Output, batch: PackedBatch) -> tuple[Tensor, dict[str, Mean]]:
        p = output["logprobs"].exp()
        terms = -((1 - p) ** config.algorithm.power) * output["logprobs"] * batch.loss_mask
        return terms, {"probability": Mean((p * batch.loss_mask).sum().detach(), batch.loss_mask.sum())}

    with Run(prepared, dataset) as run:
        engine = run.model()
        for step in run.steps():
            with step.phase("train"):
                rows = [
                    [Sequence(c.token_ids, c.loss_mask) for c in row]
                    for row in dataset.batch(step.index, config.training.global_batch_size)
                ]
                batches = rank_micro_batches(rows, run.groups, config.training.micro_batch_size)
                result = engine.train_step(batches, focal, per_sequence, step.learning_rate)
            step.log(result.figures())
    return run.status


if __name__ == "__main__":
    ALGORITHMS["toy"] = Algorithm(ToyConfig, "a toy", function="tests.helpers.toy_algorithm:toy")
    sys.exit(main())
