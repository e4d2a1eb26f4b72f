"""GRPO (arXiv 2402.03300) and its relatives: refit -> rollouts -> rewards -> log-probs -> advantages -> update.

The refit comes first in a step: a checkpoint is then saved while the trainer has the memory for itself.
"""

import torch

from megatron_posttrain.algorithms import policy
from megatron_posttrain.algorithms.advantages import group_advantages
from megatron_posttrain.algorithms.asked import Asked
from megatron_posttrain.config.algorithms import GrpoConfig
from megatron_posttrain.data.batch import PackedBatch
from megatron_posttrain.rollout.samples import Samples
from megatron_posttrain.training.engine import Engine
from megatron_posttrain.training.prepare import prepare
from megatron_posttrain.training.run import Run
from megatron_posttrain.training.sequences import sums_by_sequence


def grpo(config: GrpoConfig) -> int:
    """Trains, resumes where a run stopped, exports. Exit status: 0, or REQUEUE_STATUS when asked to stop."""
    prepared = prepare(config)
    asked = Asked.of(config, prepared)
    with Run(prepared, asked.prompts) as run:
        engine = run.model(**policy.reference_of(config))
        rollouts = policy.Rollouts.start(run, config, engine, asked)
        for step in run.steps():
            now, samples = rollouts.draw(step)
            with step.phase("train"):
                mini_batches = policy.scored_samples(samples, engine, now)
                set_advantages(samples, [batch for batches in mini_batches for batch in batches], engine, now)
                metrics = policy.update(engine, samples, mini_batches, now, step.learning_rate)
            rollouts.finish(step, samples, metrics)
    return run.status


def set_advantages(samples: Samples, batches: list[PackedBatch], engine: Engine, config: GrpoConfig) -> None:
    """Collective: of every sample, and `advantages` of every token, beside the others of its prompt or of the step."""
    algorithm = config.algorithm
    if algorithm.baseline == "batch":
        policy.set_token_advantages(samples, batches, engine, algorithm)
        return
    rewards = torch.tensor(samples.rewards)
    if algorithm.kl_in == "reward":
        paid = [policy.kl_in_reward(batch, algorithm) for batch in batches]
        rewards = rewards - sums_by_sequence(engine.groups, batches, paid, len(rewards))
    samples.advantages = group_advantages(
        rewards.float(),
        config.rollout.samples_per_prompt,
        normalize_std=algorithm.normalize_std,
        leave_one_out=algorithm.leave_one_out,
        scale=algorithm.advantage_scale,
    )
    for batch in batches:
        batch.extras["advantages"] = policy.spread(batch, samples.advantages)
