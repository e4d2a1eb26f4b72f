"""GRPO (arXiv 2402.03300): refit -> rollouts -> rewards -> group advantages -> old log-probs -> update.

The refit comes first in a step: a checkpoint is then saved while the trainer has the memory for itself.
SPMD: every rank holds its shard of the trainer and a rank of a vLLM engine; there is no controller.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial, reduce
from operator import add
from typing import Any

import torch
from torch import Tensor

from megatron_posttrain.algorithms.advantages import group_advantages
from megatron_posttrain.algorithms.losses import policy_gradient_terms
from megatron_posttrain.algorithms.model_reward import ModelReward
from megatron_posttrain.config.algorithms import GrpoAlgorithm, GrpoConfig
from megatron_posttrain.data.batch import PackedBatch
from megatron_posttrain.data.batch import Sequence as TokenSequence
from megatron_posttrain.data.dataset import PromptDataset
from megatron_posttrain.data.rows import read_rows
from megatron_posttrain.errors import UserError
from megatron_posttrain.models.architecture import Architecture
from megatron_posttrain.models.build import DTYPES
from megatron_posttrain.platform import platform
from megatron_posttrain.rewards.registry import load_rewards
from megatron_posttrain.rollout.engine import RolloutEngine
from megatron_posttrain.rollout.refit import Refit, prove
from megatron_posttrain.rollout.samples import Samples, collect_samples, save_samples
from megatron_posttrain.rollout.text import stop_message
from megatron_posttrain.rollout.turns import load_turns
from megatron_posttrain.training.batches import pack_share, to_rows, token_shares
from megatron_posttrain.training.engine import Engine, StepResult
from megatron_posttrain.training.export import full_tensors
from megatron_posttrain.training.heads import LabelLogprobs, Output
from megatron_posttrain.training.limits import prompts_of, rollout_problems
from megatron_posttrain.training.prepare import Prepared, prepare
from megatron_posttrain.training.run import Run
from megatron_posttrain.training.sequences import batch_logprobs, sequence_logprobs, sums_by_sequence
from megatron_posttrain.training.totals import Mean, Totals

CANARY_PROMPTS = 4
REFERENCE = "reference"


def grpo(config: GrpoConfig) -> int:
    """Trains, resumes where a run stopped, exports. Exit status: 0, or REQUEUE_STATUS when asked to stop."""
    prepared = prepare(config)
    turns = load_turns(config.environment, config.rollout, prepared.tokenizer, unsafe=config.sandbox.unsafe)
    prompts = check(config, prepared.tokenizer, prepared.arch, platform().name, turns.tools)
    rewards = load_rewards(config.rewards, unsafe=config.sandbox.unsafe)
    model_reward = ModelReward.of(config, prepared)
    with Run(prepared, prompts) as run:
        engine = run.model(keep=REFERENCE if config.algorithm.kl_coefficient else None)
        if model_reward is not None:
            model_reward.load(run.groups)
        if config.rollout.offload:
            engine.offload()  # vLLM asks for its share of the memory when it is made
        rollout = run.closing(make_rollout_engine(config, prepared))
        run.say(f"{rollout.replicas} rollout replicas; {stop_message(prepared.tokenizer)}")
        canary = [p.token_ids for p in prompts.prompts[:CANARY_PROMPTS]]
        for step in run.steps():
            with step.phase("refit"):
                refit(engine, rollout, config, canary, step.index)
            with step.phase("rollout"):
                batch = prompts.batch(step.index, config.rollout.prompts_per_step)
                samples = collect_samples(rollout, prepared.tokenizer, batch, rewards, config, step.index, turns)
                rollout.sleep()
            if model_reward is not None:
                with step.phase("reward_model"):
                    model_reward.add(samples, config.rollout.samples_per_prompt)
            with step.phase("train"):
                samples.advantages = group_advantages(
                    torch.tensor(samples.rewards, dtype=torch.float32),
                    config.rollout.samples_per_prompt,
                    normalize_std=config.algorithm.normalize_std,
                    leave_one_out=config.algorithm.leave_one_out,
                )
                mini_batches = receive_samples(samples, engine, config)
                score_samples(mini_batches, engine, config)
                metrics = update(engine, samples, mini_batches, config, step.learning_rate)
            step.log(metrics, samples.metrics())
            save_samples(run.directory / "rollouts" / f"step_{step.number:06d}.jsonl", samples)
    return run.status


def refit(engine: Engine, rollout: RolloutEngine, config: GrpoConfig, canary: list[list[int]], version: int) -> None:
    """New weights into the rollout engine, and the proof that it holds them: a hard stop when it does not."""
    if config.rollout.offload:
        engine.offload()
    Refit(rollout).update(full_tensors(engine), version)
    prove(rollout, canary, partial(_canary_logprobs, engine, token_budget(config)), config.rollout.proof_tolerance)


def receive_samples(samples: Samples, engine: Engine, config: GrpoConfig) -> list[list[PackedBatch]]:
    """This rank's micro-batches of every update; `training.global_batch_size` samples each."""
    size, groups = config.training.global_batch_size, engine.groups
    lengths = samples.total_lengths
    updates = []
    for start in range(0, len(lengths), size):
        shares = token_shares(lengths[start : start + size], groups.layout, engine.arch, token_budget(config))
        updates.append([[[start + i for i in batch] for batch in batches] for batches in shares])
    wanted = [[i for shares in updates for batch in shares[rank] for i in batch] for rank in range(groups.data.size())]
    mine = groups.data.rank()
    sequence = samples.receive(wanted, mine)
    return [pack_share(shares[mine], sequence, groups.layout) for shares in updates]


def score_samples(mini_batches: list[list[PackedBatch]], engine: Engine, config: GrpoConfig) -> None:
    """The trainer's own log-probs of what was sampled, where several updates need them; the reference's for KL."""

    def score(name: str) -> None:
        for batches in mini_batches:
            logprobs = batch_logprobs(engine, batches, config.rollout.temperature)
            for batch, values in zip(batches, logprobs, strict=True):
                batch.extras[name] = values

    if len(mini_batches) > 1:
        score("old_logprobs")
    if config.algorithm.kl_coefficient:
        with engine.weights(REFERENCE):
            score("reference_logprobs")


def update(
    engine: Engine, samples: Samples, mini_batches: list[list[PackedBatch]], config: GrpoConfig, lr: float
) -> dict[str, float | Mean]:
    """An optimizer step for each mini-batch.

    Log-probs of the first one are those of the policy that sampled: a single one needs no pass for them before it.
    """
    head = LabelLogprobs(config.rollout.temperature)
    loss, over = partial(policy_loss, config.algorithm), partial(denominator, config)
    results: list[StepResult] = []
    for number, batches in enumerate(mini_batches):
        if number and config.rollout.offload:
            engine.offload()  # as before the first: no update has states beside its activations
        results.append(engine.train_step(batches, loss, over, lr, head, keep=len(mini_batches) == 1))
    everything = [batch for batches in mini_batches for batch in batches]
    if len(mini_batches) > 1:
        own = [batch.extras["old_logprobs"] for batch in everything]
    else:
        own = [output["logprobs"] for output in results[0].outputs]  # on the last stage
    differences = [_difference(batch, values) for batch, values in zip(everything, own, strict=False)]
    samples.differences = sums_by_sequence(engine.groups, everything, differences, len(samples.prompts)).numpy()
    return {
        "loss": sum(r.loss for r in results) / len(results),
        "grad_norm": sum(r.grad_norm for r in results) / len(results),
    } | {name: reduce(add, (r.metrics[name] for r in results)) for name in results[0].metrics}


def _difference(batch: PackedBatch, own: Tensor) -> Tensor:
    """[T] |trainer - engine| log-probs of the policy that sampled, 0 where a label does not count."""
    own = own[: len(batch.tokens)].cpu().double()
    return (own - batch.extras["rollout_logprobs"]).abs() * batch.loss_mask


def denominator(config: GrpoConfig, totals: Totals) -> float:
    """What the terms of the global batch are divided by."""
    return {
        "token": max(1, totals.tokens),  # none where all samples are masked
        "sequence": totals.sequences,
        "constant": totals.sequences * config.rollout.max_tokens,
    }[config.algorithm.aggregation]


def token_budget(config: GrpoConfig) -> int:
    """Tokens of a micro-batch; samples share it."""
    return config.data.sequence_length * config.training.micro_batch_size


def policy_loss(algorithm: GrpoAlgorithm, output: Output, batch: PackedBatch) -> tuple[Tensor, dict[str, Mean]]:
    """The update's terms; where the batch has no old log-probs, they are those of this pass."""

    def rows(flat: Tensor) -> Tensor:
        return to_rows(flat, batch.cu_seqlens)

    rollout = rows(batch.extras["rollout_logprobs"])
    reference = batch.extras.get("reference_logprobs")
    terms, sums = policy_gradient_terms(
        rows(output["logprobs"]),
        rows(batch.extras.get("old_logprobs", output["logprobs"].detach())),
        rows(batch.extras["advantages"]),
        rows(batch.loss_mask),
        clip_low=algorithm.clip_low,
        clip_high=algorithm.clip_high,
        dual_clip=algorithm.dual_clip,
        ratio_level=algorithm.ratio_level,
        aggregation=algorithm.aggregation,
        rollout_logprobs=rollout,
        importance_cap=algorithm.importance_cap,
        # Without a reference model `kl` tells how far the update has moved from the policy that sampled.
        reference_logprobs=rows(reference) if reference is not None else rollout,
        kl_coefficient=algorithm.kl_coefficient,
        kl_estimator=algorithm.kl_estimator,
    )
    count = batch.loss_mask.sum()
    sums["entropy"] = (output["entropy"] * batch.loss_mask).sum()
    return terms, {name: Mean(total, count) for name, total in sums.items()}


def check(
    config: GrpoConfig, tokenizer: Any, arch: Architecture | None, device: str, tools: Sequence[Any] = ()
) -> PromptDataset:
    """What only RL asks of a config for `device`, cpu or cuda; the prompts. Raises UserError."""
    if wrong := list(rollout_problems(config, arch, device)):
        raise UserError("; ".join(wrong))
    return prompts_of(config, read_rows(config.data.train, columns=config.data.columns), tokenizer, tools)


def make_rollout_engine(config: GrpoConfig, prepared: Prepared) -> RolloutEngine:
    cache = config.rollout.kv_cache_gib
    return RolloutEngine(
        str(prepared.model_path),
        dtype=DTYPES[config.precision.dtype],
        tensor=config.rollout.tensor,
        max_model_len=config.data.sequence_length,
        kv_cache_bytes=None if cache is None else int(cache * 2**30),
        seed=config.training.seed,
        gpu_memory_utilization=config.rollout.gpu_memory_fraction,
        quantization=config.rollout.quantization,
        load_weights=False,
    )


def _canary_logprobs(engine: Engine, budget: int, sequences: list[list[int]]) -> list[torch.Tensor]:
    whole = [TokenSequence(ids, [1] * len(ids)) for ids in sequences]
    return sequence_logprobs(engine, whole, budget, temperature=1.0)
