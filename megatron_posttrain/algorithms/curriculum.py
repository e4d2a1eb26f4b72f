"""Curriculum: prompts that the policy nearly always or never solves are set aside, and asked again epochs later."""

from typing import Any

import numpy as np

from megatron_posttrain.config.algorithms import CurriculumConfig
from megatron_posttrain.data.dataset import Prompt, PromptDataset
from megatron_posttrain.evaluation.evaluate import CORRECT
from megatron_posttrain.rollout.samples import Samples


class Curriculum:
    """Walks the dataset's epochs, past what is set aside.

    A prompt's pass rate is the share of its samples that pass; of several visits the running mean in which each new one
    weighs as much as all before it. Before the first visit it is 1 - `metadata.difficulty`, as `sample` writes it
    (other scales, not from 0.0 to 1.0, say nothing).

    Args:
        state: plain values that checkpoints keep; changed in place.
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
