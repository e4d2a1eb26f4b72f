"""A loop written outside of the package; its first step is GRPO's, whose ratio is 1 there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.launch import forked, ranks
from tests.helpers.models import make_assets


@pytest.mark.timeout(900)
def test_first_on_policy_step_is_reinforce(tmp_path: Path) -> None:
    assets = make_assets(tmp_path)
    (tmp_path / "rewards.py").write_text(
        "from megatron_posttrain.rewards import reward\n\n\n"
        "@reward('short')\ndef short(sample):\n    return -len(sample.response) / 16\n"
    )
    (tmp_path / "config.yaml").write_text(
        f"""
        model: {{path: {assets / "model"}}}
        data: {{train: {assets / "rl.jsonl"}, sequence_length: 64}}
        precision: {{dtype: fp32}}
        rollout: {{prompts_per_step: 2, samples_per_prompt: 4, max_tokens: 16}}
        training: {{steps: 1, global_batch_size: 8, micro_batch_size: 4}}
        optimizer: {{lr: 1e-3}}
        logging: {{tensorboard: false}}
        algorithm: {{normalize_std: false}}
        rewards: [{{name: short, file: {tmp_path / "rewards.py"}}}]
        output: {tmp_path}
        """
    )
    ours = ["-m", "megatron_posttrain", "grpo", "--config"]
    found = {}
    for name, words in (("grpo", ours), ("loop", ["examples/grpo_loop.py"])):
        forked(*words, str(tmp_path / "config.yaml"), f"output={tmp_path / name}", rollout=True)
        (found[name],) = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        assert found[name]["logprob_difference"] < 1e-4
        assert found[name]["grad_norm"] > 1e-3
    for key in ("reward", "response_length", "entropy", "grad_norm"):
        assert found["loop"][key] == pytest.approx(found["grpo"][key], rel=1e-5), key
    words = ["examples/grpo_loop.py", str(tmp_path / "config.yaml"), f"output={tmp_path / 'apart'}", "rollout.ranks=1"]
    done = ranks(2, *words, rollout=True, check=False, timeout=200)
    assert done.returncode != 0
    assert "rollout.ranks: the commands grpo and ppo part their ranks" in done.stderr
