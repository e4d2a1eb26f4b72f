"""What policy-gradient algorithms share: refit, rollouts, scores, updates.

SPMD: every rank holds its shard of the trainer and, without `rollout.ranks`, a rank of a vLLM engine; there is no
controller.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial, reduce
from operator import add
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_posttrain.algorithms.advantages import generalized_advantages
from megatron_posttrain.algorithms.asked import Asked, held_out_figures
from megatron_posttrain.algorithms.draws import Draws
from megatron_posttrain.algorithms.losses import kl_estimate, policy_gradient_terms
from megatron_posttrain.algorithms.refit import Refits, token_budget
from megatron_posttrain.algorithms.rollout_ranks import RemoteDraws
from megatron_posttrain.config.algorithms import GrpoConfig, PolicyAlgorithm
from megatron_posttrain.data.batch import PackedBatch
from megatron_posttrain.errors import UserError
from megatron_posttrain.parallel.exchange import summed
from megatron_posttrain.parallel.groups import broadcast_object
from megatron_posttrain.rollout.replay import logged_file, read_logged
from megatron_posttrain.rollout.samples import Samples, save_samples
from megatron_posttrain.rollout.text import stop_message
from megatron_posttrain.training.batches import pack_share, to_rows, token_shares
from megatron_posttrain.training.engine import Engine
from megatron_posttrain.training.heads import LabelLogprobs, Output
from megatron_posttrain.training.routing import Action, routing
from megatron_posttrain.training.run import Run, Step
from megatron_posttrain.training.sequences import batch_logprobs, sums_by_sequence, values_by_sequence
from megatron_posttrain.training.totals import Mean, Totals

REFERENCE = "reference"
BAND = (0.5, 5.0)  # of ratios that are no sign of a fault (arXiv 2512.16144)
RATIO_BINS = 1e-5 * torch.linspace(-15.0, 15.0, 3001, dtype=torch.float64).sinh()  # of log-ratios; 1% wide
LOSS_OPTIONS = (
    "objective", "clip_low", "clip_high", "dual_clip", "ratio_level", "aggregation", "importance_cap",
    "importance_level", "token_band", "sequence_band", "kl_estimator", "entropy_coefficient",
)  # fmt: skip


class RunawayError(UserError):
    """What the engine samples from is no longer what is trained; earlier checkpoints stay."""

    status = 1


@dataclass
class Rollouts:
    """The rollout engine of a run, and what its steps need beside a config."""

    run: Run
    whole_config: GrpoConfig  # of all steps
    engine: Engine
    asked: Asked
    draws: Draws | RemoteDraws | None  # None where logged samples are replayed
    refits: Refits | None
    figures: dict[str, float] = field(default_factory=dict)  # of the last refit

    @classmethod
    def start(cls, run: Run, config: GrpoConfig, engine: Engine, asked: Asked) -> Rollouts:
        """Collective: once the trainer has what memory it needs."""
        if config.rollout.replay is not None:
            run.say(f"samples of {config.rollout.replay}; no rollout engine")
            return cls(run, config, engine, asked, None, None)
        if asked.model_reward is not None:
            asked.model_reward.load(run.groups)
        refits, checkpoints, bridge = Refits.of(config, run, engine), run.checkpoints, run.bridge
        saved = broadcast_object(checkpoints.carried_before())
        draws: Draws | RemoteDraws
        if bridge.group is None:
            facts = run.total_steps, asked, run.prepared.tokenizer, refits.rollout, checkpoints.state
            draws = Draws(config, *facts)
            draws.load(saved)
        else:
            draws = RemoteDraws(bridge, asked, checkpoints.state)
            state = {name: x for name, x in checkpoints.state.items() if name == "curriculum"}
            bridge.tell((run.total_steps, state, saved))
        checkpoints.carried = draws.save
        replicas = (config.rollout.ranks or dist.get_world_size()) // config.rollout.tensor
        run.say(f"{replicas} rollout replicas; {stop_message(run.prepared.tokenizer)}")
        return cls(run, config, engine, asked, draws, refits)

    def config(self, step: int) -> GrpoConfig:
        """The run's, with the numbers of this step."""
        config = self.whole_config.at(step)
        if config.algorithm.entropy_target is None:
            return config
        weight = {"entropy_coefficient": self.run.checkpoints.state.get("entropy_coefficient", 0.0)}
        return config.model_copy(update={"algorithm": config.algorithm.model_copy(update=weight)})

    def draw(self, step: Step) -> tuple[GrpoConfig, Samples]:
        """Collective: the run's config at a step, and the step's samples, graded; see `Draws`.

        New weights go into the rollout engine first, with the proof that it holds them: a hard stop when it does not.
        Where it is time for it the reference gets them too.
        """
        config, every = self.config(step.index), self.whole_config.algorithm.reference_every
        if self.run.bridge.group is not None:
            with step.phase("wait"):  # for rollout ranks, which may still draw
                self.run.bridge.order("update", step.index)
        with step.phase("refit"):
            if every is not None and step.index and step.index % every == 0:
                self.engine.keep_weights(REFERENCE)
                if config.algorithm.reset_optimizer:
                    self.engine.reset_optimizer()
            if self.refits is not None:
                self.figures = self.refits.update(config, self.asked.prompts.prompts, step.index)
        with step.phase("rollout"):
            if self.draws is None:
                samples = read_logged(logged_file(str(config.rollout.replay), step.number), config, self.engine.arch)
            else:
                samples = self.draws.take(step.index)
        samples.advantages = torch.zeros(len(samples.prompts))  # known when they were scored
        if self.asked.model_reward is not None:
            with step.phase("reward_model"):
                self.asked.model_reward.add(samples, config.rollout.samples_per_prompt)
        if config.algorithm.mask_truncated:
            samples.masked = samples.masked | samples.truncated
        return config, samples

    def validate(self, step: Step) -> dict[str, float]:
        """Collective: what the weights after a step say to held-out prompts."""
        assert self.refits is not None
        assert self.draws is not None
        asked, config = self.asked, self.config(step.index)
        self.run.bridge.order("update", step.number)
        self.figures = self.refits.update(config, asked.prompts.prompts, step.number)
        drawn, count = dict(self.draws.held_out(step.index)), config.rollout.validation_samples
        if asked.model_reward is not None:
            for samples in drawn.values():
                asked.model_reward.add(samples, count)
        return held_out_figures(drawn, count)

    def finish(self, step: Step, samples: Samples, figures: dict[str, float | Mean]) -> None:
        """Logs and saves what a step did. Raises RunawayError where trainer and engine have parted."""
        algorithm = self.whole_config.algorithm
        limit, outside = algorithm.stop_outside, figures["mismatch_outside"]
        if limit is not None and outside > limit:  # type: ignore[operator]
            raise RunawayError(
                f"step {step.number}: {outside:.1%} of the tokens have a ratio of the trainer's to the engine's "
                f"probability outside {list(algorithm.token_band or BAND)}, more than algorithm.stop_outside={limit}; "
                f"{self.run.checkpoints.left()}"
            )
        if algorithm.entropy_target is not None and isinstance(entropy := figures.get("entropy"), Mean):
            move = algorithm.at(step.index).entropy_coefficient
            move *= 1 if entropy.value < algorithm.entropy_target else -1
            weight = max(0.0, self.run.checkpoints.state.get("entropy_coefficient", 0.0) + move)
            self.run.checkpoints.state["entropy_coefficient"] = figures["entropy_coefficient"] = weight
        if self.asked.held_out and step.validates:
            with step.phase("validation", apart=True):
                figures |= self.validate(step)
        step.log(figures | self.figures, samples.metrics())
        save_samples(logged_file(self.run.directory / "rollouts", step.number), samples)


def reference_of(config: GrpoConfig) -> dict[str, Any]:
    """What `Run.model` is told about the reference."""
    algorithm = config.algorithm
    keep = REFERENCE if algorithm.needs_reference else None
    return {"keep": keep, "save_kept": algorithm.reference_every is not None}


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


def scored_samples(samples: Samples, engine: Engine, config: GrpoConfig) -> list[list[PackedBatch]]:
    """As `receive_samples`, with the trainer's own log-probs where several updates or rewards need them, and the
    reference's for KL."""
    algorithm, mini_batches = config.algorithm, receive_samples(samples, engine, config)

    def score(name: str, action: Action = None) -> None:
        for batches in mini_batches:
            with routing(engine, action):
                logprobs = batch_logprobs(engine, batches, config.rollout.temperature)
            for batch, values in zip(batches, logprobs, strict=True):
                batch.extras[name] = values

    replayed: dict[str, Action] = {"rollout": "replay", "old": "record"}
    if config.recorded:
        for batch in (batch for batches in mini_batches for batch in batches):
            batch.extras["old_logprobs"] = batch.extras["rollout_logprobs"]
    elif len(mini_batches) > 1 or algorithm.kl_in == "reward":
        score("old_logprobs", replayed.get(algorithm.routing_replay))
    if algorithm.kl_coefficient:
        with engine.weights(REFERENCE):
            score("reference_logprobs")
    return mini_batches


def train_updates(
    engine: Engine, mini_batches: list[list[PackedBatch]], offload: bool, action: Action = None, **options: Any
) -> tuple[dict[str, float | Mean], list[Output]]:
    """An optimizer step for each mini-batch, with `options` of `Engine.train_step`: figures, and what it kept."""
    results = []
    for number, batches in enumerate(mini_batches):
        if number and offload:
            engine.offload()  # as before the first: no update has states beside its activations
        with routing(engine, action):
            results.append(engine.train_step(batches, **options))
    figures = {name: sum(getattr(r, name) for r in results) / len(results) for name in ("loss", "grad_norm")}
    metrics = {name: reduce(add, (r.metrics[name] for r in results)) for name in results[0].metrics}
    return figures | metrics, [output for result in results for output in result.outputs]


def update(
    engine: Engine, samples: Samples, mini_batches: list[list[PackedBatch]], config: GrpoConfig, lr: float
) -> dict[str, float | Mean]:
    """The policy's updates.

    A single one needs no pass for the old log-probs before it, where its own are those of the policy that sampled.
    """
    keep = len(mini_batches) == 1 or config.recorded
    action: Action = None if config.algorithm.routing_replay == "none" else "replay"
    loss, over = partial(policy_loss, config.algorithm), partial(denominator, config)
    options: dict[str, Any] = {"lr": lr, "head": LabelLogprobs(config.rollout.temperature), "keep": keep}
    figures, outputs = train_updates(
        engine, mini_batches, config.rollout.offload, action, loss_function=loss, over=over, **options
    )
    everything = [batch for batches in mini_batches for batch in batches]
    return figures | compare(engine, samples, everything, outputs if keep else None, config)


def compare(
    engine: Engine, samples: Samples, batches: list[PackedBatch], outputs: list[Output] | None, config: GrpoConfig
) -> dict[str, float]:
    """Collective: how far the trainer's log-probs of the samples are from the engine's; sets `samples.differences`, and
    `samples.by_token` where it is asked for. `outputs`: of the policy that sampled, on the last stage; None: the
    batches have its log-probs.

    Returns of the ratios trainer / engine of all tokens that count percentiles 1 and 99, to 1%, and the share outside
    of `token_band`.
    """
    groups, low_high = engine.groups, config.algorithm.token_band or BAND
    own = [b.extras["old_logprobs"] for b in batches] if outputs is None else [o["logprobs"] for o in outputs]
    log_ratios = [
        (values[: len(batch.tokens)].cpu().double() - batch.extras["rollout_logprobs"]) * batch.loss_mask
        for batch, values in zip(batches, own, strict=False)  # none before the last stage
    ]
    differences = [values.abs() for values in log_ratios]
    samples.differences = sums_by_sequence(groups, batches, differences, len(samples.prompts)).numpy()
    if config.rollout.token_figures:
        found = {"logprob_differences": log_ratios, "advantages": [batch.extras["advantages"] for batch in batches]}
        if outputs is not None:
            found["entropies"] = [o["entropy"][: len(b.tokens)] for b, o in zip(batches, outputs, strict=False)]
        sizes = [length - 1 for length in samples.total_lengths]
        samples.by_token = {name: values_by_sequence(groups, batches, x, sizes) for name, x in found.items()}
    counts = torch.zeros(len(RATIO_BINS) + 2, dtype=torch.float64)
    if groups.last_stage and groups.tensor.rank() == 0 and groups.context.rank() == 0:
        counted = torch.cat([found[b.loss_mask != 0] for b, found in zip(batches, log_ratios, strict=True)])
        counts[:-1] = torch.bincount(torch.bucketize(counted, RATIO_BINS), minlength=len(RATIO_BINS) + 1)
        counts[-1] = ((counted < math.log(low_high[0])) | (counted > math.log(low_high[1]))).sum()
    *bins, outside = summed(counts).tolist()
    below, total = torch.tensor(bins).cumsum(0), max(1.0, sum(bins))
    ranks = ((below < share * total).sum().clamp(max=len(RATIO_BINS) - 1) for share in (0.01, 0.99))
    p01, p99 = (float(RATIO_BINS[rank].exp()) for rank in ranks)
    return {"mismatch_p01": p01, "mismatch_p99": p99, "mismatch_outside": outside / total}


def denominator(config: GrpoConfig, totals: Totals) -> float:
    """What the terms of the global batch are divided by."""
    return {
        "token": max(1, totals.tokens),  # none where all samples are masked
        "sequence": totals.sequences,
        "constant": totals.sequences * config.rollout.max_tokens,
    }[config.algorithm.aggregation]


def policy_loss(algorithm: PolicyAlgorithm, output: Output, batch: PackedBatch) -> tuple[Tensor, dict[str, Mean]]:
    """The update's terms; where the batch has no old log-probs, they are those of this pass."""
    rows = partial(to_rows, cu_seqlens=batch.cu_seqlens)
    rollout = rows(batch.extras["rollout_logprobs"])
    reference = batch.extras.get("reference_logprobs")
    terms, sums = policy_gradient_terms(
        rows(output["logprobs"]),
        rows(batch.extras.get("old_logprobs", output["logprobs"].detach())),
        rows(batch.extras["advantages"]),
        rows(batch.loss_mask),
        rollout_logprobs=rollout,
        # Without a reference model `kl` tells how far the update has moved from the policy that sampled.
        reference_logprobs=rows(reference) if reference is not None else rollout,
        kl_coefficient=algorithm.kl_coefficient if algorithm.kl_in == "loss" else 0.0,
        entropy=rows(output["entropy"]),
        **{name: getattr(algorithm, name) for name in LOSS_OPTIONS},
    )
    count = batch.loss_mask.sum()
    sums["entropy"] = (output["entropy"].detach() * batch.loss_mask).sum()
    return terms, {name: Mean(total, count) for name, total in sums.items()}


def spread(batch: PackedBatch, values: Tensor) -> Tensor:
    """[T] float32: of every label that counts, its sequence's entry of `values` [samples]."""
    of_sequence = torch.cat([values, values.new_zeros(1)])[batch.sequence_ids]  # a filler's number is -1
    return of_sequence.float().repeat_interleave(batch.cu_seqlens.diff().long()) * batch.loss_mask


def kl_in_reward(batch: PackedBatch, algorithm: PolicyAlgorithm) -> Tensor:
    """[T] what the KL to the reference takes from the reward of each token; 0 where it is in the loss."""
    if algorithm.kl_in == "loss" or not algorithm.kl_coefficient:
        return torch.zeros(len(batch.tokens))
    old, reference = batch.extras["old_logprobs"], batch.extras["reference_logprobs"]
    return algorithm.kl_coefficient * kl_estimate(old, reference, algorithm.kl_estimator) * batch.loss_mask


def set_token_advantages(
    samples: Samples,
    batches: list[PackedBatch],
    engine: Engine,
    algorithm: PolicyAlgorithm,
    *,
    gamma: float = 1.0,
    lam: float = 1.0,
) -> None:
    """Collective: `advantages` and `returns` of every token, by generalized advantage estimation.

    The reward is the last token's; each pays for its KL. `values` are a critic's, else 0: with gamma = lam = 1 an
    advantage is then the reward to go (REINFORCE++, arXiv 2501.03262, eq. 8). Advantages are normalised to mean 0 and
    standard deviation 1 over all tokens of the step.
    """
    moments = torch.zeros(3, dtype=torch.float64)
    totals = torch.tensor(samples.rewards)
    for batch in batches:
        rows = partial(to_rows, cu_seqlens=batch.cu_seqlens)
        mask, values = rows(batch.loss_mask), rows(batch.extras.get("values", torch.zeros(len(batch.tokens))))
        last = (mask.flip(-1).cumsum(-1).flip(-1) == 1) * mask
        rewards = rows(spread(batch, totals)) * last - rows(kl_in_reward(batch, algorithm))
        advantages, returns = generalized_advantages(rewards, values, mask, gamma=gamma, lam=lam)
        real = torch.arange(mask.shape[1]) < batch.cu_seqlens.diff()[:, None]
        batch.extras |= {"advantages": advantages[real], "returns": returns[real]}
        own = batch.extras["advantages"].double()
        moments += torch.stack([own.sum(), own.square().sum(), batch.loss_mask.double().sum()])
    total, squares, count = summed(moments, engine.groups.data).tolist()
    mean = total / max(1.0, count)
    deviation = math.sqrt(max(0.0, squares / max(1.0, count) - mean**2))
    for batch in batches:
        batch.extras["advantages"] = (batch.extras["advantages"] - mean) / (deviation + 1e-6) * batch.loss_mask
    sums = sums_by_sequence(engine.groups, batches, [b.extras["advantages"] for b in batches], len(samples.prompts))
    samples.advantages = sums / torch.tensor(samples.lengths).clamp(min=1)  # means over tokens, for the record
