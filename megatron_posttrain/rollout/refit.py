"""Refit: the trainer's weights into the engine, and the proof that they arrived."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from megatron_posttrain.models import registry
from megatron_posttrain.models.sharded import Exporter
from megatron_posttrain.models.shares import Shares, Wanted, all_of, bounds
from megatron_posttrain.parallel.exchange import gathered
from megatron_posttrain.platform import platform
from megatron_posttrain.rollout.engine import Completion, RolloutEngine

CANARY_TOKENS = 16
# Measured differences to the trainer's log-probs: fp32 at most 6e-6; bf16 0.012 on average for a dense model
# and 0.03 for a mixture of experts, where single tokens reach 2.4 because the router chose another expert.
# So the largest difference decides in fp32 and the mean in bf16.
FP32_TOLERANCE = 1e-3
BF16_TOLERANCE = 0.25


class RefitError(RuntimeError):
    """The engine does not hold the trainer's weights; its samples would be silently off-policy."""


class Refit:
    """Owns the life of a weight update: wake, stream, finish, forget what the old weights computed. `exporter`: of the
    trainer's weights, for `from_trainer`.
    """

    def __init__(self, engine: RolloutEngine, exporter: Exporter | None = None) -> None:
        self.engine, self.exporter, self.digest_seconds = engine, exporter, 0.0

    @cached_property
    def shares(self) -> Shares:
        """Collective, while the engine is awake."""
        assert self.exporter is not None
        disk = registry.layout(self.exporter.arch)
        shapes = registry.shapes(self.exporter.arch)
        wanted: list[Wanted] = []
        for boxes in self.engine.taken(disk.shapes):
            wanted.append({})
            for stored, box in boxes.items():
                for name in disk.table_names[stored]:  # of fused tensors all
                    mine = box if disk.places[name].fusion is None else all_of(shapes[name])
                    wanted[-1][name] = bounds(wanted[-1].get(name, mine), mine)
        return self.exporter.shares(wanted)

    def from_trainer(self, version: int) -> float:
        """As `update`, with the trainer's weights as they are now: a rank receives what its engine rank copies, and
        all that it hands over is compared with what the trainer holds."""
        self.engine.wake("weights")
        return self.update(self.shares.hf_tensors(), version)

    def update(self, tensors: Iterator[tuple[str, Tensor]], version: int) -> float:
        """Replaces every weight of the engine; returns seconds. Collective where `exporter` is given.

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
        self.engine.wake("weights")
        problem, cause = None, None
        try:
            self.engine.update_weights(tensors if self.exporter is None else self.shares.noted(tensors), version)
        except (KeyError, ValueError) as error:
            problem, cause = str(error), error
        self.engine.wake("kv_cache")
        platform().synchronize()
        end = time.perf_counter()
        if self.exporter is not None:
            for _ in tensors:  # where it failed: all ranks send to each other
                pass
            problems = gathered(self.shares.problem() or problem)
            problem = problem or next(filter(None, problems), None)
        if problem:
            raise RefitError(f"refit {version}: {problem}") from cause
        self.digest_seconds = time.perf_counter() - end
        return end - start

    def figures(self, seconds: float) -> dict[str, float]:
        """Of a refit from the trainer that took so long: gigabytes that this rank received, and those a second."""
        return {"refit_gb": self.shares.received / 1e9, "refit_gb_per_second": self.shares.received / 1e9 / seconds}


def prove(
    engine: RolloutEngine,
    canary_prompts: Sequence[Sequence[int]],
    trainer_logprobs: Callable[[list[list[int]]], list[Tensor]],
    tolerance: float | None = None,
) -> float:
    """Compares log-probs of the engine's greedy tokens after the canary prompts with the trainer's own.

    Collective over all ranks; every replica of the engine is checked, and all ranks raise or none.

    Args:
        canary_prompts: the same on all ranks.
        trainer_logprobs: sequences of token ids, the same on all ranks -> for each, on every rank,
            [length - 1]: log p(token t + 1 given tokens 0..t), at temperature 1.
        tolerance: nats, of the largest difference in fp32 and of the mean one in bf16; None: 1e-3 and 0.25.

    Returns the largest (fp32) or mean (bf16) difference, of the worst replica. Raises RefitError: it exceeds the
    tolerance, or a value is not finite.
    """
    fp32 = engine.dtype == torch.float32
    limit = tolerance if tolerance is not None else (FP32_TOLERANCE if fp32 else BF16_TOLERANCE)
    prompts = [list(p) for p in canary_prompts]
    room = min(engine.max_model_len - len(p) for p in prompts)
    completions = engine.greedy(prompts, min(CANARY_TOKENS, room))
    own = [p + c.token_ids for p, c in zip(prompts, completions, strict=True)]
    # A wrong replica says other tokens. The trainer's ranks must all score the same, so they score them all.
    sequences = list(dict.fromkeys(tuple(s) for said in gathered(own) for s in said))
    scores = trainer_logprobs([list(s) for s in sequences])
    trainer = dict(zip(sequences, scores, strict=True))
    finding = _compare(prompts, completions, [trainer[tuple(s)] for s in own], fp32, limit, engine.replica)
    statistic, message = max(gathered(finding), key=lambda found: (math.isnan(found[0]), found[0]))
    if not statistic <= limit:
        raise RefitError(message)
    return statistic


def _compare(
    prompts: list[list[int]],
    completions: list[Completion],
    scores: list[Tensor],
    fp32: bool,
    limit: float,
    replica: int,
) -> tuple[float, str]:
    """The largest (fp32) or mean (bf16) difference, and a message about it."""
    difference, where = [], []
    for i, (prompt, completion, score) in enumerate(zip(prompts, completions, scores, strict=True)):
        own = score.detach().double().cpu()[len(prompt) - 1 :].tolist()
        for t, (engine, trainer) in enumerate(zip(completion.logprobs, own, strict=True)):
            difference.append(abs(engine - trainer))
            where.append((i, len(prompt) + t, completion.token_ids[t], engine, trainer))
    values = torch.tensor(difference, dtype=torch.float64)
    statistic = float(values.max() if fp32 else values.mean())  # NaN wins in both
    i, position, token, engine, trainer = where[int(values.nan_to_num(nan=torch.inf).argmax())]
    return (
        statistic,
        f"the engine does not hold the trainer's weights: {'largest' if fp32 else 'mean'} difference of "
        f"log-probs {statistic:.3g} exceeds the tolerance {limit:.3g}; worst at canary prompt {i}, position "
        f"{position} (token {token}): engine {engine:.6f}, trainer {trainer:.6f} (rollout replica {replica})",
    )
