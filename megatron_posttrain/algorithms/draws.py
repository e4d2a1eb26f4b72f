"""Which prompts a step asks, and with which weights its samples are drawn: now, ahead of their step, or in parts."""

import pickle
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch.distributed as dist

from megatron_posttrain.algorithms.asked import Asked
from megatron_posttrain.algorithms.curriculum import Curriculum
from megatron_posttrain.algorithms.dynamic_sampling import replace_equal
from megatron_posttrain.config.algorithms import GrpoConfig
from megatron_posttrain.data.dataset import Prompt
from megatron_posttrain.parallel.exchange import to_first_rank
from megatron_posttrain.parallel.groups import broadcast_object
from megatron_posttrain.rollout.engine import RolloutEngine
from megatron_posttrain.rollout.regroup import deal
from megatron_posttrain.rollout.replay import logged_file, read_logged
from megatron_posttrain.rollout.samples import Samples, collect_samples
from megatron_posttrain.rollout.turns import Episode
from megatron_posttrain.training.checkpoints import CARRIED_FILE
from megatron_posttrain.training.engine import Engine
from megatron_posttrain.training.run import Run


@dataclass
class Logged:
    """Samples that another run has logged, in place of `Draws`."""

    engine: Engine

    def take(self, config: GrpoConfig, step: int, batches: int) -> Samples:
        return read_logged(logged_file(str(config.rollout.replay), step + 1), config, self.engine.arch)


@dataclass
class Draws:
    """Samples of this step and of those for which `rollout.ahead` draws now, and what was cut off. Checkpoints have
    both, so that nothing is drawn twice."""

    run: Run
    config: GrpoConfig  # of all steps
    asked: Asked
    rollout: RolloutEngine
    curriculum: Curriculum | None
    waiting: deque[Samples] = field(default_factory=deque)  # of this step and the next ones
    carried: list[Episode] = field(default_factory=list)  # samples that the last draw cut off

    @classmethod
    def start(cls, run: Run, config: GrpoConfig, asked: Asked, rollout: RolloutEngine) -> Self:
        """Collective: as the checkpoint has them from which the run goes on."""
        checkpoints, curriculum = run.checkpoints, None
        if config.curriculum is not None:
            curriculum = Curriculum(config.curriculum, asked.prompts, checkpoints.state.setdefault("curriculum", {}))
        draws = cls(run, config, asked, rollout, curriculum)
        if config.stale:
            checkpoints.carried = draws.save
            file = None if checkpoints.loaded is None else checkpoints.loaded / CARRIED_FILE
            if broadcast_object(file is not None and file.exists()):
                draws.load(file)  # type: ignore[arg-type]
        return draws

    def take(self, config: GrpoConfig, step: int, batches: int) -> Samples:
        """Collective: the samples of `step`, the run's `config` at it; draws what is missing up to `rollout.ahead`
        steps further. Where all of a prompt have one reward they are replaced, out of at most `batches`."""
        last = min(step + config.rollout.ahead, self.run.total_steps - 1)
        for index in range(step + len(self.waiting), last + 1):
            self.waiting.append(self._draw(self.config.at(index), index, batches))
        samples = self.waiting.popleft()
        if config.stale:
            samples.logged["staleness"] = float((step - samples.versions).mean())
        return samples

    def _draw(self, config: GrpoConfig, step: int, batches: int) -> Samples:
        asked, rollout, options = self.asked, config.rollout, dict[str, Any]()
        place, count = step * config.rows_per_step, config.rows_per_step
        if rollout.oversample:
            options = {"wanted": rollout.prompts_per_step, "carried": self.carried}
        if rollout.partial:
            begun = len(self.carried) // rollout.samples_per_prompt
            place, count = place + begun, count + rollout.oversample - begun
        prompts = asked.prompts.at(place, count) if self.curriculum is None else self.curriculum.take(count)

        def collect(prompts: list[Prompt], number: int) -> Samples:
            facts = self.rollout, self.run.prepared.tokenizer, prompts, asked.rewards, config, step, number, asked.turns
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
        """Collective: on rank 0, what later steps have of earlier ones."""
        parts = to_first_rank(pickle.dumps(list(self.waiting)), range(0, dist.get_world_size(), self.rollout.tensor))
        return pickle.dumps(([bytes(part) for part in parts], self.carried))

    def load(self, file: Path) -> None:
        """Collective: takes what `save` gave, unless other numbers of samples are asked for since then."""
        parts, carried = pickle.loads(broadcast_object(file.read_bytes() if self.run.is_main else b""))
        asked = self.config.rollout
        waiting = [deal(batch, self.rollout) for batch in zip(*map(pickle.loads, parts), strict=True)]
        if all(len(each.prompts) == asked.prompts_per_step * asked.samples_per_prompt for each in waiting):
            self.waiting = deque(waiting)
        if len(carried) == asked.oversample * asked.samples_per_prompt:
            self.carried = carried
