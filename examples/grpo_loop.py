"""GRPO written outside of the package: a loop of one's own from its parts, under any layout.

    torchrun --nproc-per-node 2 examples/grpo_loop.py examples/quickstart/grpo.yaml parallel.tensor=2 ...

REINFORCE with the group's mean as baseline: -A log p, one term a token, one mean over the global batch.
"""

from __future__ import annotations

import sys

import megatron_posttrain.rollout  # noqa: F401 - before torch: it sets what vLLM reads from the environment

# isort: split
import torch

from megatron_posttrain.algorithms.policy import receive_samples
from megatron_posttrain.algorithms.refit import Refits
from megatron_posttrain.config.algorithms import GrpoConfig
from megatron_posttrain.config.load import load_config
from megatron_posttrain.data.batch import PackedBatch
from megatron_posttrain.data.rows import read_rows
from megatron_posttrain.rewards.registry import load_rewards
from megatron_posttrain.rollout.samples import collect_samples
from megatron_posttrain.training.heads import LabelLogprobs, Output
from megatron_posttrain.training.limits import prompts_of
from megatron_posttrain.training.prepare import prepare
from megatron_posttrain.training.process import finish
from megatron_posttrain.training.run import Run
from megatron_posttrain.training.totals import Mean, per_token


def loss(output: Output, batch: PackedBatch) -> tuple[torch.Tensor, dict[str, Mean]]:
    """A term a token; the engine divides their sum by what counts in the whole batch."""
    entropy = (output["entropy"].detach() * batch.loss_mask).sum()
    terms = -batch.extras["advantages"] * output["logprobs"] * batch.loss_mask
    return terms, {"entropy": Mean(entropy, batch.loss_mask.sum())}


def main(file: str, *overrides: str) -> int:
    config = load_config(GrpoConfig, file, overrides)
    prepared = prepare(config)
    prompts = prompts_of(config, read_rows(config.data.sources), prepared.tokenizer)
    rewards = load_rewards(config.rewards)
    head = LabelLogprobs(config.rollout.temperature)
    with Run(prepared, prompts) as run:
        engine = run.model()
        refits = Refits.of(config, run, engine)
        for step in run.steps():
            with step.phase("refit"):
                figures = refits.update(config, prompts.prompts, step.index)
            with step.phase("rollout"):
                batch = prompts.batch(step.index, config.rollout.prompts_per_step)
                samples = collect_samples(refits.rollout, prepared.tokenizer, batch, rewards, config, step.index)
                refits.rollout.sleep()
            with step.phase("train"):
                groups = torch.tensor(samples.rewards).view(-1, config.rollout.samples_per_prompt)
                samples.advantages = (groups - groups.mean(1, keepdim=True)).flatten()
                for batches in receive_samples(samples, engine, config):  # one a `training.global_batch_size`
                    result = engine.train_step(batches, loss, per_token, step.learning_rate, head)
            step.log(result.figures(), samples.metrics(), figures)
    return run.status


if __name__ == "__main__":
    status = main(*sys.argv[1:])
    finish()
    sys.exit(status)
