"""Draws that were saved and loaded are those that went on: ahead of their step, cut off, or by a curriculum."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_posttrain.algorithms.draws import Draws
from megatron_posttrain.config.algorithms import GrpoConfig
from megatron_posttrain.config.load import load_config
from megatron_posttrain.data.dataset import PromptDataset
from megatron_posttrain.data.rows import Row
from megatron_posttrain.parallel.groups import start_distributed
from megatron_posttrain.rewards import Reward
from megatron_posttrain.rollout.engine import Completion, Request, Sampling
from megatron_posttrain.rollout.samples import generate_samples
from megatron_posttrain.rollout.turns import ONE_TURN
from tests.chat_tokenizers import CHATML, byte_tokenizer
from tests.stand_in import StandIn

STEPS = 6


class Uneven(StandIn):
    """A completion depends on seed and weights."""

    at_once = 5

    def answer(self, request: Request, sampling: Sampling) -> Completion:
        draw = np.random.default_rng([request.seed, self.version])
        ids = draw.integers(40, 90, min(request.limit, int(draw.integers(2, 30)))).tolist()
        return Completion(ids, (-draw.random(len(ids))).tolist(), "length")


def facts(draws: Draws, config: GrpoConfig, step: int) -> dict[str, Any]:
    draws.rollout.version = step
    samples = draws.take(config.at(step), step, 1)
    tokens = [ids.tolist() for ids in samples.token_ids]
    asked = [prompt.index for prompt in samples.prompts]
    return {"tokens": tokens, "asked": asked, "versions": samples.versions.tolist(), "logged": samples.logged}


@pytest.mark.parametrize(
    "keys",
    [
        ["rollout.ahead=2", "curriculum={revisit: 2}"],
        ["rollout.oversample=2", "rollout.partial=true"],
        ["rollout.oversample=1", "rollout.partial=true", "rollout.ahead=1"],
    ],
)
def test_what_is_saved_goes_on(tmp_path: Path, keys: list[str]) -> None:
    start_distributed()
    base = ["model.path=x", "data.train=x", "output=x", "rollout.prompts_per_step=3", "rollout.samples_per_prompt=2"]
    config = load_config(GrpoConfig, None, [*base, "training.global_batch_size=6", *keys])
    assert not list(config.problems(1))
    tokenizer: Any = byte_tokenizer(CHATML)
    rows = [Row([{"role": "user", "content": f"{i}?"}], str(i), source=f"x:{i}") for i in range(11)]
    rewards = [Reward("even", 1.0, lambda one: float(len(one.response) % 2))]
    asked: Any = SimpleNamespace(prompts=PromptDataset(rows, tokenizer, 100), rewards=rewards, turns=ONE_TURN)

    def start(state: Any, loaded: Path | None) -> Draws:
        checkpoints = SimpleNamespace(state=state, loaded=loaded, carried=None)
        prepared = SimpleNamespace(tokenizer=tokenizer)
        run: Any = SimpleNamespace(checkpoints=checkpoints, prepared=prepared, total_steps=STEPS, is_main=True)
        return Draws.start(run, config, asked, Uneven())  # type: ignore[arg-type]

    draws = start({}, None)
    before = [facts(draws, config, step) for step in range(3)]
    (tmp_path / "carried.pkl").write_bytes(draws.save())
    again = start(json.loads(json.dumps(draws.run.checkpoints.state)), tmp_path)
    after = [facts(draws, config, step) for step in range(3, STEPS)]
    assert [facts(again, config, step) for step in range(3, STEPS)] == after
    every = before + after
    oldest = config.rollout.ahead + config.rollout.partial
    for step, each in enumerate(every):
        assert all(0 <= step - version <= oldest for version in each["versions"])
        assert len(each["asked"]) == 6
    if draws.curriculum is None:  # none is lost, none comes twice in an epoch
        whole = [index for each in every for index in each["asked"][::2]]
        assert len(whole) == 18
        assert max(map(whole.count, whole)) <= 2


def test_an_engine_that_only_generates() -> None:
    """Of a caller's own: the same samples as from one that takes requests while others run."""

    class Own(Uneven):
        run: Any = property()  # has none

        def generate(self, prompts: Any, sampling: Sampling, seeds: Any) -> list[Completion]:
            asked = zip(prompts, seeds, strict=True)
            return [self.answer(Request(prompt, seed, sampling.max_tokens), sampling) for prompt, seed in asked]

    start_distributed()
    tokenizer: Any = byte_tokenizer(CHATML)
    rows = [Row([{"role": "user", "content": f"{i}?"}], str(i), source=f"x:{i}") for i in range(5)]
    prompts = PromptDataset(rows, tokenizer, 100).prompts
    rewards = [Reward("even", 1.0, lambda one: float(len(one.response) % 2))]
    engines: list[Any] = [Own(), Uneven()]
    own, other = (generate_samples(e, tokenizer, prompts, rewards, Sampling(2, 20), range(10)) for e in engines)
    assert [ids.tolist() for ids in own.token_ids] == [ids.tolist() for ids in other.token_ids]
    assert own.rewards.tolist() == other.rewards.tolist()
