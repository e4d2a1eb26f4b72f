"""PPO end to end on two ranks: critic and policy are trained, resumed to the last bit, and exported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from tests.algorithms.test_grpo import KEYS, lines, steady
from tests.helpers.launch import ranks
from tests.helpers.models import make_assets

REWARD = """
from megatron_posttrain.rewards import reward


@reward("short")
def short(sample):
    return -len(sample.response) / 16
"""


@pytest.mark.timeout(900)
def test_ppo_trains_resumes_and_exports(tmp_path: Path) -> None:
    assets, run = make_assets(tmp_path), tmp_path / "run"
    (tmp_path / "rewards.py").write_text(REWARD)
    arguments = [
        "-m", "megatron_posttrain", "ppo", f"model.path={assets / 'model'}", f"data.train={assets / 'rl.jsonl'}",
        f"output={run}", "precision.dtype=fp32", "parallel.tensor=2", "parallel.expert=2", "data.sequence_length=64",
        "rollout.prompts_per_step=8", "rollout.samples_per_prompt=1", "rollout.max_tokens={0: 8, 1: 12}",
        "training.steps=4", "training.global_batch_size=4", "training.micro_batch_size=2", "optimizer.lr=1e-3",
        "algorithm.kl_coefficient=0.01", "algorithm.kl_in=reward", "algorithm.kl_estimator=k1", "critic.lr=1e-2",
        "algorithm.entropy_target=9.0", "algorithm.entropy_coefficient=0.005", "critic.warmup_steps=1",
        "algorithm.reference_every=2", "checkpoint.every=1", "checkpoint.keep=4", "logging.tensorboard=false",
        f"rewards=[{{name: short, file: {tmp_path / 'rewards.py'}}}]",
    ]  # fmt: skip
    ranks(2, *arguments, rollout=True)
    metrics = lines(run / "metrics.jsonl")
    for record in metrics:
        assert record.keys() >= KEYS | {"value_loss", "critic_grad_norm", "entropy_coefficient"}
    for record in metrics:
        assert record["logprob_difference"] < 1e-4
        assert record["critic_grad_norm"] > 0
        assert record["mismatch_p01"] == pytest.approx(1, abs=1e-3)
        assert record["mismatch_outside"] == 0
    assert [m["entropy_coefficient"] for m in metrics] == pytest.approx([0.005, 0.01, 0.015, 0.02])
    longest = [max(len(s["token_ids"]) for s in lines(file)) for file in sorted((run / "rollouts").iterdir())]
    assert longest == [8, 12, 12, 12]
    # The policy stays in the first step, so that the second starts at the reference; the fourth has a new one
    assert metrics[0]["ratio"] == pytest.approx(1, abs=1e-6)
    assert [abs(metrics[step]["kl"]) < 1e-6 for step in (0, 2)] == [True, False]
    assert metrics[3]["value_loss"] < metrics[0]["value_loss"]
    state = json.loads((run / "checkpoints" / "step_000003" / "trainer_state.json").read_text())
    assert state["loop"] == {"entropy_coefficient": pytest.approx(0.015)}

    weights = [(run / name / "model.safetensors").read_bytes() for name in ("hf", "critic")]
    critic = AutoModelForSequenceClassification.from_pretrained(run / "critic")
    assert critic.num_labels == 1
    before, after = load_file(assets / "model" / "model.safetensors"), load_file(run / "critic" / "model.safetensors")
    assert any(not before[name].equal(after[name]) for name in before.keys() & after.keys())
    shutil.rmtree(run / "checkpoints" / "step_000004")
    for name in ("hf", "critic"):
        shutil.rmtree(run / name)
    ranks(2, *arguments, rollout=True)
    assert [steady(m) for m in lines(run / "metrics.jsonl")] == [steady(m) for m in metrics]
    assert [(run / name / "model.safetensors").read_bytes() for name in ("hf", "critic")] == weights
