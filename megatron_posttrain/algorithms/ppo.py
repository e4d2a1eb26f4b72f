"""PPO (arXiv 1707.06347) with a critic: a second trained model in the policy's layout, of any size.

The critic gives every token a value, from which advantages follow (generalized advantage estimation); it is trained on
the same micro-batches, saved and resumed with the policy, and exported to `critic/`.
"""

from functools import partial
from typing import Any

from torch import Tensor

from megatron_posttrain.algorithms import policy
from megatron_posttrain.algorithms.asked import Asked
from megatron_posttrain.algorithms.losses import value_terms
from megatron_posttrain.checkpoint.hf import model_directory
from megatron_posttrain.config.algorithms import PpoConfig
from megatron_posttrain.data.batch import PackedBatch
from megatron_posttrain.errors import UserError
from megatron_posttrain.models.architecture import Architecture
from megatron_posttrain.training.engine import Engine
from megatron_posttrain.training.export import export
from megatron_posttrain.training.finite import anywhere
from megatron_posttrain.training.heads import Output, Scalars
from megatron_posttrain.training.prepare import Prepared, check_beside, prepare
from megatron_posttrain.training.run import Run
from megatron_posttrain.training.schedule import learning_rate
from megatron_posttrain.training.totals import Mean

HEAD = Scalars()
CRITIC = "critic"


def ppo(config: PpoConfig) -> int:
    """Trains, resumes where a run stopped, exports. Exit status: 0, or REQUEUE_STATUS when asked to stop."""
    prepared = prepare(config)
    critic_arch = check_critic(config, prepared)
    asked = Asked.of(config, prepared)
    own, algorithm = critic_config(config), config.algorithm
    with Run(prepared, asked.prompts) as run:
        critic = Engine.of(own, critic_arch, run.groups)
        engine = run.model(beside={CRITIC: critic}, **policy.reference_of(config))
        rollouts = policy.Rollouts.start(run, config, engine, asked)
        for step in run.steps():
            now, samples = rollouts.draw(step)
            with step.phase("train"):
                mini_batches = policy.scored_samples(samples, engine, now)
                batches = [batch for batches in mini_batches for batch in batches]
                score_values(critic, batches)
                discounts = {"gamma": algorithm.gamma, "lam": algorithm.lam}
                policy.set_token_advantages(samples, batches, engine, now.algorithm, **discounts)
                rate = learning_rate(own.optimizer, step.index, run.total_steps)
                critic_figures = update_critic(critic, mini_batches, config, rate)
                # At a rate of 0 the optimizer has states, which a checkpoint needs, and weights stay
                policy_rate = 0.0 if step.index < config.critic.warmup_steps else step.learning_rate
                metrics = critic_figures | policy.update(engine, samples, mini_batches, now, policy_rate)
            rollouts.finish(step, samples, metrics)
        if not run.status:
            export(critic, model_directory(own.model.path), run.directory / CRITIC, config.model.tokenizer)
    return run.status


def critic_config(config: PpoConfig) -> PpoConfig:
    """`config` with the critic's weights and learning rate in place of the policy's; all of it is trained."""
    share = config.critic.lr / config.optimizer.lr
    optimizer = {"lr": config.critic.lr, "min_lr": config.optimizer.min_lr * share}
    changed = {
        "lora": None,
        "model": config.model.model_copy(update={"path": config.critic.path or config.model.path}),
        "optimizer": config.optimizer.model_copy(update=optimizer),
        "training": config.training.model_copy(update={"ema": None}),  # the average is what the policy exports
    }
    return config.model_copy(update=changed)


def check_critic(config: PpoConfig, prepared: Prepared) -> Architecture:
    """The critic's, with a scalar head, its own where it is a reward model. Raises UserError."""
    if config.critic.path is None:
        return prepared.arch.with_scalar_head()
    path, arch = check_beside("critic.path", config.critic.path, prepared.layout)
    if arch.vocab_size < len(prepared.tokenizer):
        raise UserError(
            f"critic.path={path} has {arch.vocab_size} tokens, the policy's tokenizer {len(prepared.tokenizer)}; "
            "allowed: a model with the policy's tokenizer"
        )
    return arch.with_scalar_head()


def score_values(critic: Engine, batches: list[PackedBatch]) -> None:
    """Collective: `values` of every token before this step's updates. Raises NotFiniteError on all ranks."""
    for batch, output in zip(batches, critic.forward(batches, HEAD), strict=True):
        batch.extras["values"] = output["values"][: len(batch.tokens)].cpu()
    if anywhere(not all(batch.extras["values"].isfinite().all() for batch in batches)):
        critic.refuse_outputs(batches, HEAD)


def update_critic(
    critic: Engine, mini_batches: list[list[PackedBatch]], config: PpoConfig, lr: float
) -> dict[str, float | Mean]:
    """An optimizer step for each mini-batch."""
    options: dict[str, Any] = {"over": lambda totals: max(1, totals.tokens), "lr": lr, "head": HEAD}
    loss = partial(value_loss, config.algorithm.value_clip)
    figures, _ = policy.train_updates(critic, mini_batches, config.rollout.offload, loss_function=loss, **options)
    return {"critic_grad_norm": figures.pop("grad_norm")} | figures


def value_loss(value_clip: float | None, output: Output, batch: PackedBatch) -> tuple[Tensor, dict[str, Mean]]:
    """A term a token of the distance between values and returns."""
    old, returns, count = batch.extras["values"], batch.extras["returns"], batch.loss_mask.sum()
    terms = value_terms(output["values"], old, returns, value_clip) * batch.loss_mask
    figures = {"value_loss": terms, "value": old, "return": returns}
    return terms, {name: Mean((each * batch.loss_mask).sum().detach(), count) for name, each in figures.items()}
