"""GRPO (arXiv 2402.03300): refit -> rollouts -> rewards -> group advantages -> old log-probs -> update.

The refit comes first in a step: a checkpoint is then saved while the trainer has the memory for itself.
SPMD: every rank holds its shard of the trainer and a rank of a vLLM engine; there is no controller.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from megatron_posttrain.algorithms.advantages import group_advantages
from megatron_posttrain.algorithms.losses import policy_gradient_loss
from megatron_posttrain.algorithms.samples import (
    Samples,
    collect_samples,
    training_sequences,
    write_rollouts,
)
from megatron_posttrain.config.schema import GrpoAlgorithm, GrpoConfig
from megatron_posttrain.data.batch import PackedBatch
from megatron_posttrain.data.batch import Sequence as TokenSequence
from megatron_posttrain.data.dataset import PromptDataset
from megatron_posttrain.data.rows import read_rows
from megatron_posttrain.errors import UserError
from megatron_posttrain.models.architecture import Architecture
from megatron_posttrain.models.build import DTYPES
from megatron_posttrain.parallel.groups import make_groups, start_distributed
from megatron_posttrain.platform import platform
from megatron_posttrain.rewards.registry import load_rewards
from megatron_posttrain.rollout.engine import RolloutEngine
from megatron_posttrain.rollout.refit import Refit, prove
from megatron_posttrain.rollout.text import stop_message
from megatron_posttrain.training.batches import rank_token_batches, to_rows
from megatron_posttrain.training.checkpoints import Checkpoints
from megatron_posttrain.training.engine import Engine, Metrics, TokenOutput
from megatron_posttrain.training.export import export_run, full_tensors
from megatron_posttrain.training.limits import prompts_of, rollout_problems
from megatron_posttrain.training.prepare import Prepared, prepare
from megatron_posttrain.training.resume import Origin
from megatron_posttrain.training.run import REQUEUE_STATUS, Run
from megatron_posttrain.training.schedule import learning_rate, total_steps
from megatron_posttrain.training.sequences import gather_sequences, sequence_logprobs
from megatron_posttrain.training.timing import PhaseTimer

CANARY_PROMPTS = 4


def grpo(config: GrpoConfig) -> int:
    """Trains, resumes where a run stopped, exports. Exit status: 0, or REQUEUE_STATUS when asked to stop."""
    prepared = prepare(config)
    prompts = check(config, prepared.tokenizer, prepared.arch, platform().name)
    rewards = load_rewards(config.rewards)
    steps = total_steps(config.training, prompts, config.rollout.prompts_per_step)
    origin = Origin.of(config, prepared.model_path, prompts.fingerprint)
    checkpoints = Checkpoints(config.output_dir, config.checkpoint, origin)
    start_distributed()
    groups = make_groups(prepared.layout, config.training.seed)
    engine = Engine(config, prepared.arch, groups)
    reference = Engine(config, prepared.arch, groups, train=False) if config.algorithm.kl_coefficient else None
    first = checkpoints.resume(engine)
    if config.rollout.offload:
        engine.offload()  # vLLM asks for its share of the memory when it is made
    rollout = make_rollout_engine(config, prepared)
    canary = [p.token_ids for p in prompts.prompts[:CANARY_PROMPTS]]

    def refit(version: int) -> None:
        """New weights into the engine, and the proof that it holds them: a hard stop when it does not."""
        if config.rollout.offload:
            engine.offload()
        Refit(rollout).update(full_tensors(engine), version)
        scores = partial(_canary_logprobs, engine, token_budget(config))
        prove(rollout, canary, scores, config.rollout.proof_tolerance)

    with Run(config, steps, first) as run:
        run.say(f"{prompts.message}; {steps} steps on {prepared.layout}, {rollout.replicas} rollout replicas")
        run.say(stop_message(prepared.tokenizer))
        for step in range(first, steps):
            timer = PhaseTimer(memory=True)
            with timer("refit"):
                refit(step)
            with timer("rollout"):
                batch = prompts.batch(step, config.rollout.prompts_per_step)
                samples = collect_samples(rollout, prepared.tokenizer, batch, rewards, config, step)
                rollout.sleep()
            with timer("train"):
                samples.advantages = group_advantages(
                    torch.tensor(samples.rewards),
                    config.rollout.samples_per_prompt,
                    normalize_std=config.algorithm.normalize_std,
                    leave_one_out=config.algorithm.leave_one_out,
                )
                score_samples(samples, engine, reference, config)
                lr = learning_rate(config.optimizer, step, steps)
                metrics = update(engine, samples, config, lr)
            seconds = timer.total()
            run.log(
                step + 1,
                metrics
                | samples.metrics()
                | {
                    "learning_rate": lr,
                    "tokens_per_second": samples.tokens / seconds,
                    "step_seconds": seconds,
                }
                | {f"{phase}_seconds": value for phase, value in timer.seconds.items()}
                | {f"{phase}_memory_gib": value for phase, value in timer.memory_gib.items()},
            )
            if run.is_main:
                write_rollouts(config.output_dir / "rollouts" / f"step_{step + 1:06d}.jsonl", samples)
            if checkpoints.after_step(engine, run, step + 1):
                return REQUEUE_STATUS
        export_run(engine, checkpoints, run, prepared.model_path)
    rollout.close()
    return 0


def score_samples(samples: Samples, engine: Engine, reference: Engine | None, config: GrpoConfig) -> None:
    """The trainer's own log-probs of what was sampled, where several updates need them; the reference's for KL."""
    sequences = training_sequences(samples)
    budget = token_budget(config)
    temperature = config.rollout.temperature
    if len(sequences) > config.training.global_batch_size:
        samples.set_logprobs("old_logprobs", sequence_logprobs(engine, sequences, budget, temperature))
    if reference is not None:
        samples.set_logprobs("reference_logprobs", sequence_logprobs(reference, sequences, budget, temperature))


def update(engine: Engine, samples: Samples, config: GrpoConfig, lr: float) -> dict[str, float]:
    """Optimizer steps over the samples, `training.global_batch_size` of them a step.

    Log-probs of the first one are those of the policy that sampled: a single one needs no pass for them before it.
    """
    sequences = training_sequences(samples)
    size = config.training.global_batch_size
    budget = token_budget(config)
    results = []
    for start in range(0, len(sequences), size):
        if start and config.rollout.offload:
            engine.offload()  # as before the first: no update has states beside its activations
        mini_batch = sequences[start : start + size]
        batches = rank_token_batches(mini_batch, engine.groups, budget)
        counted = sum(sum(s.loss_mask) for s in mini_batch)
        denominator = {
            "token": counted,
            "sequence": len(mini_batch),
            "constant": len(mini_batch) * config.rollout.max_tokens,
        }[config.algorithm.aggregation]
        kept: list[TokenOutput] = []
        loss = partial(policy_loss, config.algorithm, float(denominator), kept)
        results.append((counted, engine.train_step(batches, loss, lr, config.rollout.temperature)))
        if "old_logprobs" not in samples.token_fields:
            own = engine.from_last_stage(kept, batches)
            samples.set_logprobs("old_logprobs", gather_sequences(engine.groups, batches, own))
    total = sum(counted for counted, _ in results)
    names = results[0][1].metrics
    return {
        "loss": sum(r.loss for _, r in results) / len(results),
        "grad_norm": sum(r.grad_norm for _, r in results) / len(results),
    } | {name: sum(r.metrics[name] for _, r in results) / total for name in names}


def token_budget(config: GrpoConfig) -> int:
    """Tokens of a micro-batch; samples share it."""
    return config.data.sequence_length * config.training.micro_batch_size


def policy_loss(
    algorithm: GrpoAlgorithm, denominator: float, kept: list[TokenOutput], output: TokenOutput, batch: PackedBatch
) -> tuple[torch.Tensor, Metrics]:
    """The update's loss; keeps log-probs, which are the old ones too where the batch has none."""
    own = TokenOutput(output.logprobs.detach(), output.entropy)
    kept.append(own)

    def rows(flat: torch.Tensor) -> torch.Tensor:
        return to_rows(flat, batch.cu_seqlens)

    rollout = rows(batch.extras["rollout_logprobs"])
    reference = batch.extras.get("reference_logprobs")
    loss, metrics = policy_gradient_loss(
        rows(output.logprobs),
        rows(batch.extras.get("old_logprobs", own.logprobs)),
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
        denominator=denominator,
    )
    return loss, {**metrics, "entropy": (output.entropy * batch.loss_mask).sum()}


def check(config: GrpoConfig, tokenizer: Any, arch: Architecture | None, device: str) -> PromptDataset:
    """What only RL asks of a config for `device`, cpu or cuda; the prompts. Raises UserError."""
    if wrong := list(rollout_problems(config, arch, device)):
        raise UserError("; ".join(wrong))
    return prompts_of(config, read_rows(config.data.train, columns=config.data.columns), tokenizer)


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
