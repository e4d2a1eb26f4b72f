"""Presets, schedules by step, advantages of tokens and dynamic sampling, without a model."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_posttrain.algorithms.advantages import group_advantages
from megatron_posttrain.algorithms.asked import held_out_figures
from megatron_posttrain.algorithms.draws import Curriculum, replace_equal
from megatron_posttrain.algorithms.grpo import set_advantages
from megatron_posttrain.algorithms.losses import value_terms
from megatron_posttrain.algorithms.policy import (
    RATIO_BINS,
    Rollouts,
    RunawayError,
    compare,
    policy_loss,
    set_token_advantages,
)
from megatron_posttrain.config.algorithms import CurriculumConfig, GrpoAlgorithm, GrpoConfig, PpoConfig
from megatron_posttrain.config.load import load_config, to_yaml
from megatron_posttrain.config.presets import PRESETS
from megatron_posttrain.data.batch import PackedBatch, filler, pack_batch
from megatron_posttrain.data.batch import Sequence as TokenSequence
from megatron_posttrain.data.dataset import Epochs, Prompt, PromptDataset
from megatron_posttrain.errors import UserError
from megatron_posttrain.evaluation.statistics import clustered_interval
from megatron_posttrain.parallel.groups import start_distributed
from megatron_posttrain.rollout.samples import Samples

REQUIRED = ("model.path=x", "data.train=x", "output=x")


def config(*overrides: str, schema: type[GrpoConfig] = GrpoConfig) -> GrpoConfig:
    return load_config(schema, None, [*REQUIRED, *overrides])


# ---- the config --------------------------------------------------------------------------------------------

# What papers and recipes say (RECIPES.md, section 3), as the loss sees it.
PUBLISHED: dict[str, dict[str, Any]] = {
    "grpo": {"clip_low": 0.2, "clip_high": 0.2, "aggregation": "sequence", "normalize_std": True, "kl_in": "loss",
             "kl_coefficient": 0.04, "kl_estimator": "k3"},
    "dapo": {"clip_low": 0.2, "clip_high": 0.28, "aggregation": "token", "kl_coefficient": 0, "dynamic_sampling": 10},
    "dr_grpo": {"clip_high": 0.2, "aggregation": "constant", "normalize_std": False, "kl_coefficient": 0},
    "gspo": {"clip_low": 3e-4, "clip_high": 4e-4, "ratio_level": "sequence", "aggregation": "sequence"},
    "cispo": {"objective": "cispo", "clip_high": 4.0, "aggregation": "token", "kl_coefficient": 0},
    "rloo": {"leave_one_out": True, "normalize_std": False, "kl_in": "reward", "kl_estimator": "k1"},
    "reinforce_plus_plus": {"baseline": "batch", "advantage_scale": "batch", "kl_in": "reward"},
}  # fmt: skip


def test_presets_are_the_published_values(tmp_path: Path) -> None:
    assert PUBLISHED.keys() == PRESETS.keys()
    for name, values in PUBLISHED.items():
        found = config(f"algorithm.preset={name}", "training.global_batch_size=256")
        assert {key: getattr(found.algorithm, key) for key in values} == values, name
        assert not list(found.problems(1)), name
        (tmp_path / "again.yaml").write_text(to_yaml(found))
        assert load_config(GrpoConfig, tmp_path / "again.yaml") == found  # what --print-config shows
    explicit = config("algorithm.preset=dapo", "algorithm.clip_high=0.3", "algorithm.mask_truncated=false").algorithm
    assert (explicit.clip_high, explicit.mask_truncated, explicit.dynamic_sampling) == (0.3, False, 10)
    with pytest.raises(UserError, match="found 'dappo'"):
        config("algorithm.preset=dappo")


def test_numbers_by_step() -> None:
    found = config("rollout.max_tokens={0: 8, 500: 16, 900: 12}", "algorithm.clip_high={0: 0.2, 3: 0.28}")
    steps = [(found.at(s).rollout.max_tokens, found.at(s).algorithm.clip_high) for s in (0, 3, 499, 500, 5000, None)]
    assert steps == [(8, 0.2), (8, 0.28), (8, 0.28), (16, 0.28), (12, 0.28), (16, 0.28)]
    assert found.at(7).rollout.temperature == 1.0
    too_long = config("rollout.max_tokens={0: 8, 500: 2048}", "training.global_batch_size=256")
    assert any("rollout.max_tokens=2048" in problem for problem in too_long.problems(1))  # the largest counts
    for steps_given, said in (
        ("{3: 8, 2: 16}", "rise from 0, found 3, 2"),
        ("{5: 8}", "rise from 0, found 5"),
        ("{}", "found none"),
        ("{-1: 8}", "greater than or equal to 0, found -1"),
        ("{0: 8, 2: -16}", r"key 'rollout.max_tokens.2': .* found -16"),
    ):
        with pytest.raises(UserError, match=said):
            config(f"rollout.max_tokens={steps_given}")


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("dual_clip=0.9", "more than 1"),
        ("objective=cispo; clip_low=0.1", "clip_low=0.1 has no effect"),
        ("importance_level=sequence", "without importance_cap"),
        ("token_band=[2, 3]", r"allowed: \[below 1, above 1\]"),
        ("kl_in=reward", "without kl_coefficient"),
        ("reference_every=4", "without kl_coefficient"),
        ("reset_optimizer=true", "without reference_every"),
        ("entropy_target=0.2", "without entropy_coefficient"),
        ("baseline=batch", "goes with advantage_scale=batch"),
        ("advantage_scale=batch; normalize_std=false", "no effect with normalize_std=false"),
    ],
)
def test_idle_keys_are_refused(key: str, said: str) -> None:
    found = list(config(*(f"algorithm.{part}" for part in key.split("; "))).problems(1))
    assert any(re.match(rf"algorithm\..*{said}", problem) for problem in found), found


# ---- advantages --------------------------------------------------------------------------------------------

LENGTHS = (3, 1, 4, 2)  # tokens of four responses, after prompts of two tokens
GROUPS: Any = SimpleNamespace(
    last_stage=True, tensor=SimpleNamespace(rank=lambda: 0), context=SimpleNamespace(rank=lambda: 0), data=None
)
ENGINE: Any = SimpleNamespace(groups=GROUPS)


def batches(names: Sequence[str], seed: int = 0) -> list[PackedBatch]:
    """Two micro-batches of the responses, and a filler."""
    random = np.random.default_rng(seed)
    sequences = []
    for index, length in enumerate(LENGTHS):
        extras = {name: random.normal(size=2 + length) for name in names}
        sequences.append(TokenSequence(range(2 + length), [0, 0] + [1] * length, extras, index=index))
    return [pack_batch(sequences[:2], multiple=4), pack_batch([*sequences[2:], filler()], multiple=4)]


def samples(rewards: Sequence[float]) -> Any:
    return SimpleNamespace(rewards=np.array(rewards), lengths=np.array(LENGTHS), prompts=[None] * len(rewards))


def by_sequence(found: list[PackedBatch], name: str) -> list[list[float]]:
    parts = [part for batch in found for part in batch.per_sequence(batch.extras[name])]
    return [part[1:].tolist() for part, length in zip(parts, LENGTHS, strict=False) if length]


@pytest.mark.parametrize("gamma_lam", [(1.0, 1.0), (0.9, 0.8)])
@pytest.mark.parametrize("critic", [True, False])
def test_advantages_of_tokens_are_a_plain_loops(critic: bool, gamma_lam: tuple[float, float]) -> None:
    start_distributed()
    gamma, lam = gamma_lam
    found = batches(["old_logprobs", "reference_logprobs", *(["values"] if critic else [])])
    algorithm = GrpoAlgorithm(preset="reinforce_plus_plus", kl_coefficient=0.3)
    rewards, expected = [1.0, -0.5, 0.25, 2.0], []
    old, reference = by_sequence(found, "old_logprobs"), by_sequence(found, "reference_logprobs")
    values = by_sequence(found, "values") if critic else [[0.0] * n for n in LENGTHS]
    for i, n in enumerate(LENGTHS):
        earned = [-0.3 * (old[i][t] - reference[i][t]) + (rewards[i] if t == n - 1 else 0) for t in range(n)]
        following = [*values[i][1:], 0.0]
        deltas = [earned[t] + gamma * following[t] - values[i][t] for t in range(n)]
        expected.append([sum((gamma * lam) ** k * d for k, d in enumerate(deltas[t:])) for t in range(n)])
    found_samples = samples(rewards)
    set_token_advantages(found_samples, found, ENGINE, algorithm, gamma=gamma, lam=lam)
    flat = np.concatenate(expected)
    for i, row in enumerate(by_sequence(found, "returns")):
        assert row == pytest.approx([a + v for a, v in zip(expected[i], values[i], strict=True)], abs=1e-5)
    for i, row in enumerate(by_sequence(found, "advantages")):
        assert row == pytest.approx((np.array(expected[i]) - flat.mean()) / flat.std(), abs=1e-5)
        assert found_samples.advantages[i] == pytest.approx(np.mean(row), abs=1e-6)
    assert all(not batch.extras["advantages"][batch.loss_mask == 0].any() for batch in found)


def test_rloo_pays_for_the_kl_of_a_whole_response() -> None:
    start_distributed()
    found, rewards = batches(["old_logprobs", "reference_logprobs"]), [1.0, 0.0, 0.5, 0.25]
    old, reference = by_sequence(found, "old_logprobs"), by_sequence(found, "reference_logprobs")
    paid = [r - 0.05 * (sum(old[i]) - sum(reference[i])) for i, r in enumerate(rewards)]
    set_advantages(samples(rewards), found, ENGINE, config("algorithm.preset=rloo", "rollout.samples_per_prompt=2"))
    for i, row in enumerate(by_sequence(found, "advantages")):
        assert row == pytest.approx([paid[i] - paid[i ^ 1]] * LENGTHS[i], abs=1e-6)


def test_standard_deviation_of_the_batch() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.5, 0.25, 1.0, 0.0], dtype=torch.float64)
    centred = (rewards.view(2, 4) - rewards.view(2, 4).mean(1, keepdim=True)).flatten().numpy()
    found = group_advantages(rewards, 4, scale="batch")
    np.testing.assert_allclose(found.numpy(), centred / (centred.std(ddof=1) + 1e-6), rtol=1e-9)


def test_value_loss_and_its_gradient() -> None:
    g = torch.Generator().manual_seed(0)
    values, old, returns = (torch.randn(50, generator=g, dtype=torch.float64) for _ in range(3))
    values.requires_grad_()
    terms = value_terms(values, old, returns, 0.2)
    (gradient,) = torch.autograd.grad(terms.sum(), values)
    for v, o, r, term, slope in zip(*(x.tolist() for x in (values, old, returns, terms, gradient)), strict=True):
        near = o + max(-0.2, min(0.2, v - o))
        clipped = (near - r) ** 2 > (v - r) ** 2
        assert term == pytest.approx(0.5 * max((v - r) ** 2, (near - r) ** 2), rel=1e-9)
        assert slope == pytest.approx(0.0 if clipped else v - r, rel=1e-9)
    torch.testing.assert_close(value_terms(values, old, returns), 0.5 * (values - returns) ** 2)


# ---- updates -----------------------------------------------------------------------------------------------


def test_first_update_has_ratio_one_and_reinforces_gradient() -> None:
    (batch, _) = batches(["rollout_logprobs", "advantages"])
    logprobs = torch.randn(len(batch.tokens), requires_grad=True)
    output = {"logprobs": logprobs, "entropy": torch.rand(len(batch.tokens))}
    terms, metrics = policy_loss(GrpoAlgorithm(), output, batch)
    (gradient,) = torch.autograd.grad(terms.sum(), logprobs)
    assert metrics["ratio"].value == 1.0
    assert metrics["clip_fraction"].value == 0.0
    assert torch.equal(gradient, -batch.extras["advantages"] * batch.loss_mask)


def test_ratios_to_the_engine_are_counted() -> None:
    start_distributed()
    found = batches(["rollout_logprobs", "old_logprobs"])
    kept: Any = samples([0.0] * 4)
    figures = compare(ENGINE, kept, found, None, config("algorithm.token_band=[0.8, 1.5]"))
    ratios = np.exp(
        np.concatenate(by_sequence(found, "old_logprobs")) - np.concatenate(by_sequence(found, "rollout_logprobs"))
    )
    assert figures["mismatch_outside"] == pytest.approx(np.mean((ratios < 0.8) | (ratios > 1.5)))
    assert figures["mismatch_p99"] == pytest.approx(ratios.max(), rel=0.02 * abs(np.log(ratios.max())) + 1e-4)
    assert figures["mismatch_p01"] == pytest.approx(ratios.min(), rel=0.02 * abs(np.log(ratios.min())) + 1e-4)
    assert kept.differences.sum() == pytest.approx(np.abs(np.log(ratios)).sum(), rel=1e-6)
    assert torch.all(RATIO_BINS.diff() > 0)


def test_a_run_that_runs_away_ends() -> None:
    run = SimpleNamespace(checkpoints=SimpleNamespace(left=lambda: "step_000004 is whole"))
    rollouts: Any = SimpleNamespace(whole_config=config("algorithm.stop_outside=0.1"), run=run)
    step: Any = SimpleNamespace(number=5)
    with pytest.raises(RunawayError, match=r"step 5: 20.0% of the tokens .*\[0.5, 5.0\].* step_000004") as found:
        Rollouts.finish(rollouts, step, samples([]), {"mismatch_outside": 0.2})
    assert found.value.status == 1


# ---- samples of a step, and of held-out prompts ---------------------------------------------------------------


def drawn(prompts: Sequence[Prompt], size: int = 2) -> Samples:
    """Samples whose rewards are equal where the prompt's number is a multiple of three."""
    numbers = [p.index for p in prompts for _ in range(size)]
    n = len(numbers)
    return Samples(
        prompts=[p for p in prompts for _ in range(size)],
        lengths=np.ones(n, np.int64),
        truncated=np.zeros(n, bool),
        rewards=np.array([0.0 if number % 3 == 0 else float(k % size) for k, number in enumerate(numbers)]),
        rewards_by_name={},
        masked=np.zeros(n, bool),
        seconds=1.0,
        drawn=range(n),
        token_ids=[np.array([number], np.int32) for number in numbers],
        logprobs=[np.zeros(1, np.float32)] * n,
        texts=[str(number) for number in numbers],
        grades=[],
        logged={},
        messages=[],
        sampled=np.ones(n, np.int64),
        ranks_per_replica=1,
        replica_of=np.zeros(n, np.int64),
        versions=np.zeros(n, np.int64),
    )


@pytest.mark.parametrize(("count", "most", "useful"), [(60, 10, 6), (60, 1, 4), (7, 10, 4), (9, 10, 6)])
def test_prompts_of_equal_rewards_are_replaced(count: int, most: int, useful: int) -> None:
    dataset: Any = SimpleNamespace(prompts=[Prompt(i, [1], None, {}, []) for i in range(count)])
    first, asked = dataset.prompts[:6], []

    def collect(prompts: list[Prompt], number: int) -> Samples:
        asked.append([p.index for p in prompts])
        return drawn(prompts)

    found = replace_equal(drawn(first), first, dataset, [0, 0], most, collect)
    kept = [prompt.index for prompt in found.prompts[::2]]
    assert len(kept) == len(set(kept)) == 6
    assert sum(number % 3 != 0 for number in kept) == useful
    assert not {0, 1, 2, 3, 4, 5} & {number for batch in asked for number in batch}
    assert [int(token[0]) for token in found.token_ids] == [p.index for p in found.prompts]
    assert found.texts == [str(p.index) for p in found.prompts]
    assert found.metrics()["generated_batches"] == 1 + len(asked) <= most
    again = replace_equal(drawn(first), first, dataset, [0, 0], most, collect)
    assert [prompt.index for prompt in again.prompts[::2]] == kept


def test_curriculum_sets_aside_and_revisits() -> None:
    dataset: Any = PromptDataset.__new__(PromptDataset)
    known = [{}, {}, {}, {"difficulty": 1.0}, {"difficulty": 5}, {"difficulty": 0.5}]
    dataset.seed, dataset.prompts = 0, [Prompt(i, [1], None, known[i], []) for i in range(6)]
    Epochs.__init__(dataset)
    state: dict[str, Any] = {}
    curriculum = Curriculum(CurriculumConfig(revisit=2), dataset, state)
    right = {0: 0.0, 1: 1.0, 2: 1.0, 3: 0.0, 4: 1.0, 5: 1.0}  # reward of every second sample; of 2 of all

    def epoch(count: int) -> list[int]:
        asked = curriculum.take(count)
        samples = drawn(asked)
        samples.rewards = np.array([right[p.index] if k or p.index == 2 else 0.0 for p in asked for k in range(2)])
        curriculum.see(samples, 2)
        assert samples.logged == {
            "curriculum/solved": sum(rate >= 0.9 for rate, _ in state["rates"].values()) / 6,
            "curriculum/hopeless": sum(rate <= 0 for rate, _ in state["rates"].values()) / 6,
        }
        return sorted(p.index for p in asked)

    assert epoch(5) == [0, 1, 2, 4, 5]  # 3 is known to be hopeless
    assert state["rates"]["1"][0] == 0.5
    assert (state["rates"]["0"][0], state["rates"]["2"][0]) == (0.0, 1.0)
    assert epoch(3) == [1, 4, 5]
    copied = json.loads(json.dumps(state))
    assert epoch(6) == [0, 1, 2, 3, 4, 5]  # two epochs later
    again = Curriculum(CurriculumConfig(revisit=2), dataset, copied)
    assert sorted(p.index for p in again.take(6)) == [0, 1, 2, 3, 4, 5]
    assert {p.index for p in curriculum.prompts} == {1, 4, 5}


def test_figures_of_held_out_prompts() -> None:
    """Against every choice of k of a prompt's four responses."""
    samples = drawn([Prompt(i, [1], None, {}, []) for i in range(9)], 4)
    samples.masked[5] = True  # prompt 1's second one, which would have been right
    found = held_out_figures({"few": samples}, 4)
    right = [[k > 0 and i % 3 > 0 and (i, k) != (1, 1) for k in range(4)] for i in range(9)]
    for k in (2, 4):
        chosen = [any(each) for row in right for each in itertools.combinations(row, k)]
        assert found[f"validation_pass_at_{k}"] == pytest.approx(np.mean(chosen))
    assert found["validation_accuracy"] == pytest.approx(17 / 36)
    shares = [sum(row) / 4 for row in right]
    assert (found["validation_accuracy_low"], found["validation_accuracy_high"]) == clustered_interval(shares, 4)
    both = held_out_figures({"few": samples, "none": drawn([Prompt(0, [1], None, {}, [])] * 2, 4)}, 4)
    assert both["validation_accuracy"] == both["validation_accuracy/few"] / 2 == found["validation_accuracy"] / 2
    assert both["validation_pass_at_4/none"] == 0


def test_ppo_is_refused_with_what_it_would_ignore() -> None:
    with pytest.raises(UserError, match=r"unknown key 'algorithm\.preset'"):
        config("algorithm.preset=dapo", schema=PpoConfig)
    found = config("lora={rank: 4}", "rollout.samples_per_prompt=1", "training.global_batch_size=32", schema=PpoConfig)
    assert list(found.problems(1)) == []  # the critic is trained whole
    assert "lambda: 0.95" in to_yaml(found)


@pytest.fixture(autouse=True, scope="module")
def world_of_one() -> Any:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
