"""Draws that were saved and loaded are those that went on: ahead of their step, cut off, or by a curriculum."""

import json
import math
import re
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_posttrain.algorithms.draws import Draws
from megatron_posttrain.config.algorithms import GrpoConfig
from megatron_posttrain.config.load import load_config
from megatron_posttrain.data.dataset import PromptDataset
from megatron_posttrain.data.rows import Row
from megatron_posttrain.errors import UserError
from megatron_posttrain.parallel.groups import start_distributed
from megatron_posttrain.rewards import Reward, Sample
from megatron_posttrain.rollout.engine import Completion, Request, Sampling
from megatron_posttrain.rollout.samples import Samples, generate_samples
from megatron_posttrain.rollout.turns import ONE_TURN
from tests.helpers.chat_tokenizers import CHATML, byte_tokenizer
from tests.helpers.stand_in import StandIn

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
    draws.draw(step, step + config.rollout.ahead)
    samples = draws.pop(step)
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
def test_what_is_saved_goes_on(keys: list[str]) -> None:
    start_distributed()
    base = ["model.path=x", "data.train=x", "output=x", "rollout.prompts_per_step=3", "rollout.samples_per_prompt=2"]
    config = load_config(GrpoConfig, None, [*base, "training.global_batch_size=6", *keys])
    assert not list(config.problems(1))
    tokenizer: Any = byte_tokenizer(CHATML)
    rows = [Row([{"role": "user", "content": f"{i}?"}], str(i), source=f"x:{i}") for i in range(11)]
    rewards = [Reward("even", 1.0, lambda one: float(len(one.response) % 2))]
    asked: Any = SimpleNamespace(prompts=PromptDataset(rows, tokenizer, 100), rewards=rewards, turns=ONE_TURN)

    draws = Draws(config, STEPS, asked, tokenizer, Uneven(), {})  # type: ignore[arg-type]
    before = [facts(draws, config, step) for step in range(3)]
    again = Draws(config, STEPS, asked, tokenizer, Uneven(), json.loads(json.dumps(draws.state)))  # type: ignore[arg-type]
    again.load(draws.save())
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


def drawn(engine: Any, grade: Any, count: int = 5) -> Samples:
    start_distributed()
    tokenizer: Any = byte_tokenizer(CHATML)
    rows = [Row([{"role": "user", "content": f"{i}?"}], str(i), source=f"x:{i}") for i in range(count)]
    prompts = PromptDataset(rows, tokenizer, 100).prompts
    rewards = [Reward("mine", 1.0, grade)]
    return generate_samples(engine, tokenizer, prompts, rewards, Sampling(2, 20), range(2 * count))


def test_rewards_run_while_others_are_drawn() -> None:
    graded: list[str] = []
    seen: list[int] = []

    class Waits(Uneven):
        at_once = 3

        def wait(self, running: int) -> None:
            """Of the last ones, which are not drawn until the first are graded."""
            if running < self.at_once:
                until = time.monotonic() + 10
                while not graded and time.monotonic() < until:
                    time.sleep(0.01)
                seen.append(len(graded))

    def grade(sample: Sample) -> float:
        graded.append(sample.response)
        return float(len(sample.response))

    samples = drawn(Waits(), grade)
    assert 0 < seen[0] < len(graded) == 10
    assert samples.rewards.tolist() == [len(text) for text in samples.texts]


def test_values_that_are_no_numbers_are_refused_or_masked() -> None:
    """A function that never gives a number is wrong; one that sometimes gives none has met what it cannot grade."""
    for value, shown in [(math.nan, "nan"), (None, "None"), ([1.0], "[1.0]")]:
        with pytest.raises(UserError, match=re.escape(f"reward 'mine' returned {shown}; it must return")):
            drawn(Uneven(), lambda sample, value=value: value)
    samples = drawn(Uneven(), lambda sample: math.nan if len(sample.response) % 2 else 1.0)
    assert 0 < samples.masked.sum() < 10
    assert samples.masked.tolist() == [len(text) % 2 == 1 for text in samples.texts]
    assert drawn(Uneven(), lambda sample: 1 / 0).masked.all()  # what raises may be a judge that is down


def test_an_engine_that_only_generates() -> None:
    """Of a caller's own: the same samples as from one that takes requests while others run."""

    class Own(Uneven):
        run: Any = property()  # has none

        def generate(self, prompts: Any, sampling: Sampling, seeds: Any) -> list[Completion]:
            asked = zip(prompts, seeds, strict=True)
            return [self.answer(Request(prompt, seed, sampling.max_tokens), sampling) for prompt, seed in asked]

    own, other = (drawn(engine, lambda one: float(len(one.response) % 2)) for engine in (Own(), Uneven()))
    assert [ids.tolist() for ids in own.token_ids] == [ids.tolist() for ids in other.token_ids]
    assert own.rewards.tolist() == other.rewards.tolist()
