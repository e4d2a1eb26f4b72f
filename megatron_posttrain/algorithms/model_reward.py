"""The reward `reward_model`: what a model that `reward-model` trained gives a conversation, in the trainer's layout."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch.distributed as dist

from megatron_posttrain.algorithms.preferences import last_values, score_sequences
from megatron_posttrain.algorithms.reward_model import HEAD
from megatron_posttrain.config.algorithms import GrpoConfig
from megatron_posttrain.config.schema import RewardConfig
from megatron_posttrain.data.batch import Sequence as TokenSequence
from megatron_posttrain.data.template import Template, load_tokenizer
from megatron_posttrain.errors import UserError
from megatron_posttrain.parallel.groups import Groups
from megatron_posttrain.rewards.registry import MODEL
from megatron_posttrain.rollout.samples import Samples, mask
from megatron_posttrain.training.engine import Engine
from megatron_posttrain.training.prepare import Prepared, check_beside


class ModelReward:
    """A frozen reward model, of any size. It reads conversations through its own tokenizer and chat template.

    Raises UserError where the directory is no reward model, or one that the trainer's layout cannot run.
    """

    def __init__(self, spec: RewardConfig, prepared: Prepared) -> None:
        self.spec, self.config = spec, prepared.config
        path, self.arch = check_beside("rewards.path", str(spec.path), prepared.layout)
        if not self.arch.scalar_head:
            raise UserError(f"rewards.path={path} is no reward model; allowed: OUTPUT/hf of the command reward-model")
        self.tokenizer = load_tokenizer(path)

    @classmethod
    def of(cls, config: GrpoConfig, prepared: Prepared) -> ModelReward | None:
        """None where no reward is a model's."""
        return next((cls(spec, prepared) for spec in config.rewards if spec.name == MODEL), None)

    def load(self, groups: Groups) -> None:
        """Collective: reads the weights."""
        model = self.config.model.model_copy(update={"path": self.spec.path, "random_init": False})
        self.engine = Engine(self.arch, groups, model, self.config.precision)

    def add(self, samples: Samples, group: int) -> None:
        """Collective: grades the samples, `group` of a prompt, beside what other rewards gave them."""
        spec, values = self.spec, self._values(samples)
        failed = np.isnan(values)
        instead = 0.0 if spec.on_error == "mask" else float(spec.on_error)
        samples.masked |= failed & (spec.on_error == "mask")
        samples.rewards += spec.weight * np.where(failed, instead, values)
        samples.rewards = mask(samples.rewards, samples.masked, group)
        samples.rewards_by_name[spec.name] = values

    def _values(self, samples: Samples) -> np.ndarray:
        """[n] NaN where the model cannot read a conversation."""
        drawn = zip(samples.drawn, samples.messages, strict=False)  # none but on the first ranks of replicas
        mine = [(k, self._tokens(samples, k, turns)) for k, turns in drawn]
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, mine)
        found = dict(pair for part in parts for pair in part)
        tokens = [found[k] for k in range(len(samples.prompts))]
        known = [i for i, ids in enumerate(tokens) if 0 < len(ids) <= self.arch.context_length]
        values = np.full(len(tokens), np.nan)
        if known:
            sequences = [TokenSequence(tokens[i], np.ones(len(tokens[i]))) for i in known]
            budget = max(self.config.data.sequence_length, *(len(tokens[i]) for i in known))
            values[known] = score_sequences(self.engine, sequences, budget, HEAD, last_values).numpy()
        return values

    def _tokens(self, samples: Samples, k: int, turns: list[Any]) -> np.ndarray:
        """Of sample `k`, as `reward-model` trains on conversations; none where the template does not write it."""
        prompt = samples.prompts[k]
        text = Template(self.tokenizer, prompt.options).render([*prompt.messages, *turns]) or ""
        return np.array(self.tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)
