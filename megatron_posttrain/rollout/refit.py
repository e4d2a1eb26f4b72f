"""Refit: the trainer's weights into the engine, and the proof that they arrived."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from megatron_posttrain.models.sharded import Exporter, Held
from megatron_posttrain.models.shares import Shares, Wanted, all_of, bounds
from megatron_posttrain.parallel.bridge import Bridge
from megatron_posttrain.parallel.exchange import gathered
from megatron_posttrain.platform import platform
from megatron_posttrain.rollout.engine import Completion, RolloutEngine

ALONE = Bridge()  # every rank trains and generates
CANARY_TOKENS = 128  # of a prompt: vLLM has the logits of all of them at once
DRAWN_TOKENS = 4  # after it, by its cache
# Measured differences to the trainer's log-probs: fp32 at most 6e-6; bf16 0.012 on average for a dense model
# and 0.03 for a mixture of experts, where single tokens reach 2.4 because the router chose another expert;
# prompts of SmolLM2, whose tokens are less likely than drawn ones, 0.048.
# So the largest difference decides in fp32 and the mean in bf16.
FP32_TOLERANCE = 1e-3
BF16_TOLERANCE = 0.25


class RefitError(RuntimeError):
    """The engine does not hold the trainer's weights; its samples would be silently off-policy."""


class Refit:
    """Owns the life of a weight update: wake, stream, finish, forget what the old weights computed. `exporter`: of the
    trainer's weights, for `from_trainer`. Over a `bridge` a trainer has no engine, and a rollout rank no exporter.
    """

    def __init__(self, engine: RolloutEngine | None, exporter: Exporter | None = None, bridge: Bridge = ALONE) -> None:
        self.engine, self.exporter, self.bridge, self.digest_seconds = engine, exporter, bridge, 0.0

    @cached_property
    def shares(self) -> Shares:
        """Collective; wakes the engine."""
        told = self.bridge.tell(None if self.exporter is None else self.exporter.held)
        held: Held = told if self.exporter is None else self.exporter.held
        wanted = self.bridge.tell(None if self.engine is None else wanted_by(self.engine, held), back=True)
        return Shares(*held, wanted, platform().device, group=self.bridge.group)

    def from_trainer(self, version: int) -> float:
        """As `update`, with the trainer's weights as they are now: a rank receives what its engine rank copies, and
        all that it hands over is compared with what the trainer holds."""
        return self.update(self.shares.hf_tensors(), version)

    def update(self, tensors: Iterator[tuple[str, Tensor]], version: int) -> float:
        """Replaces every weight of the engine; returns seconds. Collective where they are a trainer's.

        Args:
            tensors: in the shape of unsharded Hugging Face tensors, under their names; the engine takes its shard. It
                keeps each until its module is complete, so order them by layer to bound memory, and do not write to
                what was yielded before `update` returns.
            version: of the weights, counted by the caller.

        Raises RefitError: a tensor of the model did not come, one came that the model does not have, or, on all ranks,
        one is not what the trainer holds.
        """
        platform().synchronize()
        start = time.perf_counter()
        # On CUDA in this order: writing to weights before they are mapped touches unmapped memory, and the
        # cache comes last because the tensors in flight need its room.
        problem, cause = None, None
        shared = self.exporter is not None or self.bridge.generates
        noted = self.shares.noted(tensors) if shared else tensors
        if self.engine is not None:
            self.engine.wake("weights")
            try:
                self.engine.update_weights(noted, version)
            except (KeyError, ValueError) as error:
                problem, cause = str(error), error
            self.engine.wake("kv_cache")
        else:
            deque(noted, 0)  # it only sends
        platform().synchronize()
        end = time.perf_counter()
        if shared:
            deque(tensors, 0)  # where it failed: all ranks send to each other
            problems = gathered(self.shares.problem() or problem, self.bridge.group)
            problem = problem or next(filter(None, problems), None)
        if problem:
            raise RefitError(f"refit {version}: {problem}") from cause
        self.digest_seconds = time.perf_counter() - end
        return end - start

    def figures(self, seconds: float) -> dict[str, float]:
        """Of a refit from the trainer that took so long: gigabytes that an engine's rank received, and those a
        second."""
        return {"refit_gb": self.shares.received / 1e9, "refit_gb_per_second": self.shares.received / 1e9 / seconds}


def wanted_by(engine: RolloutEngine, held: Held) -> list[Wanted]:
    """Collective: what each rank of a replica copies of the trainer's tensors; wakes the engine."""
    _, plans, disk, _ = held
    engine.wake("weights")
    shapes = {name: shape for plan in plans for name, shape in plan.named_shapes()}
    wanted: list[Wanted] = []
    for boxes in engine.taken(disk.shapes):
        wanted.append({})
        for stored, box in boxes.items():
            for name in disk.table_names[stored]:  # of fused tensors all
                mine = box if disk.places[name].fusion is None else all_of(shapes[name])
                wanted[-1][name] = bounds(wanted[-1].get(name, mine), mine)
    return wanted


def prove(
    engine: RolloutEngine | None,
    canary_prompts: Sequence[Sequence[int]],
    trainer_logprobs: Callable[[list[list[int]]], list[Tensor]],
    tolerance: float | None = None,
    bridge: Bridge = ALONE,
) -> float:
    """Compares the engine's log-probs of canary prompts, and of greedy tokens after them, with the trainer's own.

    Collective over all ranks; every replica of the engine is checked, and all ranks raise or none. Over a `bridge` a
    trainer has no engine, and what a rollout rank's `trainer_logprobs` gives is not looked at.

    Args:
        canary_prompts: the same on all ranks; of each the first `CANARY_TOKENS`.
        trainer_logprobs: sequences of token ids, the same on all ranks -> for each, on every rank,
            [length - 1]: log p(token t + 1 given tokens 0..t), at temperature 1.
        tolerance: nats, of the largest difference in fp32 and of the mean one in bf16; None: 1e-3 and 0.25.

    Returns the largest (fp32) or mean (bf16) difference, of the worst replica. Raises RefitError: it exceeds the
    tolerance, or a value is not finite.
    """
    said: list[Completion] = []
    if engine is not None:
        prompts = [prompt[: min(CANARY_TOKENS, engine.max_model_len - DRAWN_TOKENS)] for prompt in canary_prompts]
        said = engine.said(prompts, DRAWN_TOKENS)
    own = [c.token_ids for c in said]
    # A wrong replica says other tokens. The trainer's ranks must all score the same, so they score them all.
    sequences = list(dict.fromkeys(tuple(s) for said in gathered(own, bridge.group) for s in said))
    scores = [score.detach().double().cpu() for score in trainer_logprobs([list(s) for s in sequences])]
    trainer = dict(zip(sequences, bridge.tell(scores), strict=True))
    finding = 0.0, ""
    if engine is not None:
        finding = _compare(engine, said, [trainer[tuple(s)] for s in own], tolerance)
    statistic, message = max(gathered(finding, bridge.group), key=lambda found: (math.isnan(found[0]), found[0]))
    if message:
        raise RefitError(message)
    return statistic


def _compare(
    engine: RolloutEngine, said: list[Completion], scores: list[Tensor], tolerance: float | None
) -> tuple[float, str]:
    """The largest (fp32) or mean (bf16) difference, and where it exceeds the tolerance a message about it."""
    fp32 = engine.dtype == torch.float32
    limit = tolerance if tolerance is not None else (FP32_TOLERANCE if fp32 else BF16_TOLERANCE)
    difference, where = [], []
    for i, (canary, score) in enumerate(zip(said, scores, strict=True)):
        first = len(canary.token_ids) - len(canary.logprobs)
        for t, (engines, trainers) in enumerate(zip(canary.logprobs, score[first - 1 :].tolist(), strict=True), first):
            difference.append(abs(engines - trainers))
            where.append((i, t, canary.token_ids[t], engines, trainers))
    values = torch.tensor(difference, dtype=torch.float64)
    statistic = float(values.max() if fp32 else values.mean())  # NaN wins in both
    if statistic <= limit:
        return statistic, ""
    i, position, token, engines, trainers = where[int(values.nan_to_num(nan=torch.inf).argmax())]
    return (
        statistic,
        f"the engine does not hold the trainer's weights: {'largest' if fp32 else 'mean'} difference of "
        f"log-probs {statistic:.3g} exceeds the tolerance {limit:.3g}; worst at canary prompt {i}, position "
        f"{position} (token {token}): engine {engines:.6f}, trainer {trainers:.6f} (rollout replica {engine.replica})",
    )
