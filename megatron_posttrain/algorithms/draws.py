"""Which prompts a step asks, and with which weights its samples are drawn: now, ahead of their step, or in parts."""

import math
import pickle
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch.distributed as dist

from megatron_posttrain.algorithms.asked import Asked
from megatron_posttrain.config.algorithms import CurriculumConfig, GrpoConfig
from megatron_posttrain.data.dataset import Prompt, PromptDataset
from megatron_posttrain.evaluation.evaluate import CORRECT
from megatron_posttrain.parallel.exchange import to_first_rank
from megatron_posttrain.rollout.engine import RolloutEngine, Sampling
from megatron_posttrain.rollout.in_flight import InFlight
from megatron_posttrain.rollout.regroup import deal, join
from megatron_posttrain.rollout.samples import Samples, collect_samples, generate_samples
from megatron_posttrain.rollout.turns import Episode


class Curriculum:
    """Walks the dataset's epochs, past prompts that the policy nearly always or never solves: they are asked again
    epochs later.

    A prompt's pass rate is the share of its samples that pass; of several visits the running mean in which each new one
    weighs as much as all before it. Before the first visit it is 1 - `metadata.difficulty`, as `sample` writes it
    (other scales, not from 0.0 to 1.0, say nothing). `state`: plain values that checkpoints keep; changed in place.
    """

    def __init__(self, config: CurriculumConfig, dataset: PromptDataset, state: dict[str, Any]) -> None:
        self.config, self.dataset = config, dataset
        state |= {"place": 0, "rates": {}} | state  # rates: pass rate and epoch of the last visit, by the row's number
        self.state = state

    @property
    def prompts(self) -> list[Prompt]:
        """Those that are not set aside now."""
        return [prompt for prompt in self.dataset.prompts if self._asks(prompt)]

    def take(self, count: int) -> list[Prompt]:
        """The next ones to ask."""
        taken: list[Prompt] = []
        while len(taken) < count:
            (prompt,) = self.dataset.at(self.state["place"], 1)
            taken += [prompt] if self._asks(prompt) else []
            self.state["place"] += 1
        return taken

    def see(self, samples: Samples, group: int) -> None:
        """Takes the pass rates of prompts, `group` samples each, and logs how many are set aside for what."""
        rates, epoch = self.state["rates"], (self.state["place"] - 1) // len(self.dataset)
        for k in range(0, len(samples.prompts), group):
            graded = samples.rewards[k : k + group][~samples.masked[k : k + group]]
            if len(graded):
                index, share = str(samples.prompts[k].index), float(np.mean(graded > CORRECT))
                rates[index] = [(rates[index][0] + share) / 2 if index in rates else share, epoch]
        found = np.array([rate for rate, _ in rates.values()])
        samples.logged |= {
            "curriculum/solved": float((found >= self.config.solved).sum()) / len(self.dataset),
            "curriculum/hopeless": float((found <= self.config.hopeless).sum()) / len(self.dataset),
        }

    def _asks(self, prompt: Prompt) -> bool:
        difficulty = prompt.metadata.get("difficulty")
        estimate = (1 - difficulty, 0) if isinstance(difficulty, float) and 0 <= difficulty <= 1 else None
        if (known := self.state["rates"].get(str(prompt.index), estimate)) is None:
            return True
        rate, visited = known
        epochs = self.state["place"] // len(self.dataset) - visited
        return self.config.hopeless < rate < self.config.solved or epochs >= self.config.revisit


def replace_equal(
    samples: Samples,
    prompts: Sequence[Prompt],
    dataset: PromptDataset | Curriculum,
    seed: Sequence[int],
    batches: int,
    collect: Callable[[list[Prompt], int], Samples],
) -> Samples:
    """Dynamic sampling (DAPO, arXiv 2503.14476, eq. 11): prompts whose samples all have one reward teach nothing.

    Collective: samples of as many prompts, those with unequal rewards first; with equal ones where `batches` are not
    enough, or no prompt is left.

    Args:
        samples: of `prompts`, the first batch.
        seed: of this step's choice of further prompts, so that a resumed run makes the same.
        collect: the samples of the batch with this number.
    """
    wanted, size = len(prompts), len(samples.prompts) // len(prompts)
    parts, asked = [samples], {prompt.index for prompt in prompts}
    for number in range(1, batches):
        found = sum(int(_unequal(part, size).sum()) for part in parts)
        left = [prompt for prompt in dataset.prompts if prompt.index not in asked]
        if found >= wanted or not left:
            break
        # As many as should be enough at the rate seen so far
        count = min(wanted, math.ceil((wanted - found) * len(asked) / max(1, found)))
        further = [left[i] for i in np.random.default_rng([*seed, number]).permutation(len(left))[:count]]
        asked |= {prompt.index for prompt in further}
        parts.append(collect(further, number))
    groups = [(part, group, useful) for part in parts for group, useful in enumerate(_unequal(part, size))]
    chosen = sorted(groups, key=lambda group: not group[2])[:wanted]
    figures = {
        "generated_batches": float(len(parts)),
        "generated_reward": float(np.concatenate([part.rewards for part in parts]).mean()),
        "equal_fraction": 1 - float(np.mean([useful for *_, useful in groups])),
    }
    return join([(part, group * size + i) for part, group, _ in chosen for i in range(size)], figures)


def _unequal(samples: Samples, size: int) -> np.ndarray:
    """[prompts]"""
    rewards = samples.rewards.reshape(-1, size)
    return (rewards != rewards[:, :1]).any(1)


@dataclass
class Draws:
    """Samples of this step and of those for which `rollout.ahead` draws now, and what was cut off. Checkpoints have
    both, so that nothing is drawn twice."""

    config: GrpoConfig  # of all steps
    total_steps: int
    asked: Asked
    tokenizer: Any
    rollout: RolloutEngine
    state: dict[str, Any]  # plain values that checkpoints keep; changed in place
    waiting: deque[Samples] = field(default_factory=deque)  # of this step and the next ones
    carried: list[Episode] = field(default_factory=list)  # samples that the last draw cut off
    in_flight: InFlight | None = None  # orders that are followed while samples for training are drawn

    def __post_init__(self) -> None:
        given, self.curriculum = self.config.curriculum, None
        if given is not None:
            self.curriculum = Curriculum(given, self.asked.prompts, self.state.setdefault("curriculum", {}))

    def take(self, step: int) -> Samples:
        """Collective: the samples of a step; draws what is missing up to `rollout.ahead` steps further, after which the
        engine sleeps."""
        self.draw(step, step + self.config.rollout.ahead)
        self.rollout.sleep()
        return self.pop(step)

    def pop(self, step: int) -> Samples:
        """The samples of a step, which are drawn; others are for `rollout.ahead` steps further."""
        self.last = step + self.config.rollout.ahead
        samples = self.waiting.popleft()
        if self.config.stale:
            samples.logged["staleness"] = float((step - samples.versions).mean())
        return samples

    def draw(self, step: int, last: int) -> None:
        """Collective: what is missing from `step`, the first one that waits, up to `last` or the end of the run. Where
        all samples of a prompt have one reward they are replaced, if `algorithm.dynamic_sampling` is set."""
        self.last, index = last, step + len(self.waiting)
        while index <= min(self.last, self.total_steps - 1):  # the last one moves where samples are taken in flight
            self.waiting.append(self._draw(self.config.at(index), index))
            index += 1

    def held_out(self, step: int) -> Iterator[tuple[str, Samples]]:
        """Collective: what the engine's weights say to every held-out set, drawn as in a step's training, with the same
        seeds at every look; then it sleeps."""
        rollout = self.config.at(step).rollout
        count, repetitions = rollout.validation_samples, rollout.repetitions
        sampling = Sampling(count, rollout.max_tokens, rollout.temperature, repetitions=repetitions)
        for name, prompts in self.asked.held_out.items():
            facts = self.rollout, self.tokenizer, prompts, self.asked.rewards, sampling, range(len(prompts) * count)
            yield name, generate_samples(*facts, self.asked.turns)
        self.rollout.sleep()

    def _draw(self, config: GrpoConfig, step: int) -> Samples:
        asked, rollout, options = self.asked, config.rollout, dict[str, Any](in_flight=self.in_flight)
        batches = getattr(config.algorithm, "dynamic_sampling", None) or 1
        place, count = step * config.rows_per_step, config.rows_per_step
        if rollout.oversample:
            options |= {"wanted": rollout.prompts_per_step, "carried": self.carried}
        if rollout.partial:
            begun = len(self.carried) // rollout.samples_per_prompt
            place, count = place + begun, count + rollout.oversample - begun
        prompts = asked.prompts.at(place, count) if self.curriculum is None else self.curriculum.take(count)

        def collect(prompts: list[Prompt], number: int) -> Samples:
            facts = self.rollout, self.tokenizer, prompts, asked.rewards, config, step, number, asked.turns
            samples = collect_samples(*facts, **options)
            if self.curriculum is not None:
                self.curriculum.see(samples, rollout.samples_per_prompt)
            return samples

        samples = collect(prompts, 0)
        self.carried, samples.left = samples.left if rollout.partial else [], []
        if batches > 1:
            pool, seed = self.curriculum or asked.prompts, [config.training.seed, step]
            samples = replace_equal(samples, prompts, pool, seed, batches, collect)
        return samples

    def save(self) -> bytes:
        """Collective: on rank 0, what later steps have of earlier ones, if they have anything."""
        if not self.config.stale:
            return b""
        own, sources = bytearray(pickle.dumps(list(self.waiting))), range(0, dist.get_world_size(), self.rollout.tensor)
        parts = to_first_rank(own, sources)
        return pickle.dumps(([bytes(part) for part in parts], self.carried))

    def load(self, saved: bytes) -> None:
        """Takes what `save` gave, unless other numbers of samples are asked for since then."""
        if not saved or not self.config.stale:
            return
        parts, carried = pickle.loads(saved)
        asked, replica, replicas = self.config.rollout, self.rollout.replica, self.rollout.replicas
        batches = zip(*map(pickle.loads, parts), strict=True)
        waiting = [deal(batch[0], batch[replica::replicas], replicas, self.rollout.tensor) for batch in batches]
        if all(len(each.prompts) == asked.prompts_per_step * asked.samples_per_prompt for each in waiting):
            self.waiting = deque(waiting)
        if len(carried) == asked.oversample * asked.samples_per_prompt:
            self.carried = carried
