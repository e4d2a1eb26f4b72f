"""What a policy is asked, also of held-out prompts: figures by which a best step is chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_posttrain.algorithms.model_reward import ModelReward
from megatron_posttrain.config.algorithms import REWARD, GrpoConfig
from megatron_posttrain.data.dataset import Prompt, PromptDataset
from megatron_posttrain.data.rows import read_rows
from megatron_posttrain.errors import UserError
from megatron_posttrain.evaluation.evaluate import CORRECT
from megatron_posttrain.evaluation.statistics import clustered_interval, pass_at_k
from megatron_posttrain.platform import platform
from megatron_posttrain.rewards.registry import Reward, load_rewards
from megatron_posttrain.rollout.replay import logged_file
from megatron_posttrain.rollout.samples import Samples
from megatron_posttrain.rollout.turns import Turns, load_turns
from megatron_posttrain.training.limits import prompts_of, rollout_problems
from megatron_posttrain.training.prepare import Prepared
from megatron_posttrain.training.schedule import total_steps

Sets = dict[str, list[Prompt]]


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
            ModelReward.of(config, prepared),
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
