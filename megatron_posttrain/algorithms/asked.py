"""What a policy is asked, also of held-out prompts, and what grades its answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from megatron_posttrain.algorithms.preferences import last_values, score_sequences
from megatron_posttrain.algorithms.reward_model import HEAD
from megatron_posttrain.config.algorithms import REWARD, GrpoConfig
from megatron_posttrain.config.schema import RewardConfig
from megatron_posttrain.data.batch import Sequence as TokenSequence
from megatron_posttrain.data.dataset import Prompt, PromptDataset
from megatron_posttrain.data.rows import read_rows
from megatron_posttrain.data.template import Template, load_tokenizer
from megatron_posttrain.errors import UserError
from megatron_posttrain.evaluation.evaluate import CORRECT
from megatron_posttrain.evaluation.statistics import clustered_interval, pass_at_k
from megatron_posttrain.parallel.exchange import gathered
from megatron_posttrain.parallel.groups import Groups
from megatron_posttrain.platform import platform
from megatron_posttrain.rewards.registry import MODEL, Reward, load_rewards
from megatron_posttrain.rollout.replay import logged_file
from megatron_posttrain.rollout.samples import Samples, mask
from megatron_posttrain.rollout.turns import Turns, load_turns
from megatron_posttrain.training.engine import Engine
from megatron_posttrain.training.limits import prompts_of, rollout_problems
from megatron_posttrain.training.prepare import Prepared, check_beside
from megatron_posttrain.training.schedule import total_steps

Sets = dict[str, list[Prompt]]


class ModelReward:
    """The reward `reward_model`: what a model that `reward-model` trained gives conversations, in the trainer's layout.

    It is frozen, of any size, and reads conversations through its own tokenizer and chat template. Raises UserError
    where the directory is no reward model, or one that the trainer's layout cannot run.
    """

    def __init__(self, spec: RewardConfig, prepared: Prepared) -> None:
        self.spec, self.config = spec, prepared.config
        path, self.arch = check_beside("rewards.path", str(spec.path), prepared.layout)
        if not self.arch.scalar_head:
            raise UserError(f"rewards.path={path} is no reward model; allowed: OUTPUT/hf of the command reward-model")
        self.tokenizer = load_tokenizer(path)

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
        found = dict(pair for part in gathered(mine) for pair in part)
        tokens = [found[k] for k in range(len(samples.prompts))]
        known = [i for i, ids in enumerate(tokens) if 0 < len(ids) <= self.arch.context_length]
        values = np.full(len(tokens), np.nan)
        if known:
            units = [[TokenSequence(tokens[i], np.ones(len(tokens[i])))] for i in known]
            budget = max(self.config.data.sequence_length, *(len(tokens[i]) for i in known))
            values[known] = score_sequences(self.engine, units, budget, HEAD, last_values).numpy()
        return values

    def _tokens(self, samples: Samples, k: int, turns: list[Any]) -> np.ndarray:
        """Of sample `k`, as `reward-model` trains on conversations; none where the template does not write it."""
        prompt = samples.prompts[k]
        text = Template(self.tokenizer, prompt.options).render([*prompt.messages, *turns]) or ""
        return np.array(self.tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)


@dataclass
class Asked:
    """What the model is asked, what answers its turns, and what grades them."""

    prompts: PromptDataset
    turns: Turns
    rewards: list[Reward]
    model_reward: ModelReward | None
    held_out: Sets  # drawn as in training

    @classmethod
    def of(cls, config: GrpoConfig, prepared: Prepared) -> Asked:
        """Raises UserError for what only RL asks of a config."""
        if wrong := list(rollout_problems(config, prepared.arch, platform().name)):
            raise UserError("; ".join(wrong))
        turns = load_turns(config.environment, config.rollout, prepared.tokenizer, unsafe=config.sandbox.unsafe)
        rows = read_rows(config.data.sources, columns=config.data.columns)
        prompts = prompts_of(config, rows, prepared.tokenizer, turns.tools)
        if config.rollout.replay is not None:
            steps = range(1, 1 + total_steps(config.training, prompts, config.rows_per_step))
            files = [logged_file(config.rollout.replay, step) for step in steps]
            if missing := next((file for file in files if not file.is_file()), None):
                raise UserError(f"rollout.replay: {missing} is not there; the run has {len(steps)} steps")
            return cls(prompts, turns, [], None, {})
        return cls(
            prompts,
            turns,
            load_rewards(config.rewards, unsafe=config.sandbox.unsafe),
            next((ModelReward(spec, prepared) for spec in config.rewards if spec.name == MODEL), None),
            held_out_sets(config, prepared.tokenizer, turns.tools),
        )


def held_out_sets(config: GrpoConfig, tokenizer: Any, tools: list[dict[str, Any]]) -> Sets:
    """The prompts of every file of `data.validation`, by its name without suffix. Raises UserError."""
    sets: Sets = {}
    for source in config.data.held_out:
        if (name := Path(source).stem) in sets:
            raise UserError(f"data.validation: two files are called {name}, by which figures are told apart")
        sets[name] = prompts_of(config, read_rows([source], columns=config.data.columns), tokenizer, tools).prompts
    return sets


def held_out_figures(drawn: Mapping[str, Samples], group: int) -> dict[str, float]:
    """Of `group` samples a prompt; of several sets each its own, and means over the sets."""
    found = {name: _figures(samples, group) for name, samples in drawn.items()}
    if len(found) == 1:
        return {f"validation_{figure}": value for own in found.values() for figure, value in own.items()}
    means = {f"validation_{figure}": fmean(own[figure] for own in found.values()) for figure in REWARD}
    return means | {f"validation_{figure}/{name}": x for name, own in found.items() for figure, x in own.items()}


def _figures(samples: Samples, group: int) -> dict[str, float]:
    """`accuracy` is mean@k with its 95% interval, whose clusters are the prompts; what no reward could grade is
    wrong."""
    right = ((samples.rewards > CORRECT) & ~samples.masked).reshape(-1, group)
    low, high = clustered_interval(right.mean(1).tolist(), group)
    ks = sorted({group, *(2**i for i in range(group.bit_length()))} - {1})
    return {
        "accuracy": float(right.mean()),
        "accuracy_low": low,
        "accuracy_high": high,
        **{f"pass_at_{k}": fmean(pass_at_k(group, int(n), k) for n in right.sum(1)) for k in ks},
        "reward": float(samples.rewards.mean()),
        "response_length": float(samples.sampled.mean()),
        "truncated_fraction": float(samples.truncated.mean()),
    }
