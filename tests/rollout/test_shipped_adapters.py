"""RL on adapters: what vLLM samples with the adapter beside its own base is what it samples with the merged model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_posttrain.algorithms.asked import Asked
from megatron_posttrain.config.algorithms import GrpoConfig
from megatron_posttrain.errors import UserError
from megatron_posttrain.training.prepare import prepare
from tests.helpers.launch import ranks
from tests.helpers.preference_models import rows_of
from tests.helpers.rollout_models import EVEN, make_model, make_tokenizer


def config(place: Path, output: str, **changes: Any) -> dict[str, Any]:
    rollout = {"prompts_per_step": 2, "samples_per_prompt": 4, "max_tokens": 12} | changes.pop("rollout", {})
    return {
        "model": {"path": str(place / "model")},
        "precision": {"dtype": "fp32"},
        "data": {"train": str(place / "rl.jsonl"), "sequence_length": 64},
        "optimizer": {"lr": 3e-2, "schedule": "constant"},
        "training": {"steps": 2, "global_batch_size": 8, "micro_batch_size": 2},
        "lora": {"rank": 4, "targets": "all-linear"},
        "rewards": [{"name": "even", "file": str(place / "even.py")}],
        "rollout": rollout,
        "logging": {"tensorboard": False},
        "output": str(place / output),
    } | changes


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("shipped")
    make_model(directory / "model", "dense_untied", seed=0)
    make_tokenizer(directory / "model")
    (directory / "even.py").write_text(EVEN)
    rows = [{"prompt": f"{a} and {a + 1}?", "answer": "1"} for a in range(4)]
    (directory / "rl.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def test_shipped_and_merged_adapters_sample_alike_and_a_policy_with_adapters_has_a_critic(place: Path) -> None:
    shipped = config(place, "shipped", rollout={"adapters": "ship"})
    algorithm = {"kl_coefficient": 0.1}
    jobs = [
        ("grpo", shipped | {"algorithm": algorithm}),
        ("grpo", config(place, "merged", algorithm=algorithm)),
        ("ppo", config(place, "critic", critic={"lr": 1e-3})),
    ]
    (place / "jobs.json").write_text(json.dumps(jobs))
    ranks(1, "-m", "tests.helpers.preference_worker", str(place / "jobs.json"), rollout=True)
    for step in (1, 2):  # before the second one the adapter was trained
        said = [rows_of(place / x / "rollouts" / f"step_{step:06d}.jsonl") for x in ("shipped", "merged")]
        assert [s["token_ids"] for s in said[0]] == [s["token_ids"] for s in said[1]]
        assert {s["version"] for part in said for s in part} == {step - 1}
    ours, theirs = (rows_of(place / x / "metrics.jsonl") for x in ("shipped", "merged"))
    for key in ("loss", "grad_norm", "kl", "reward"):
        assert [m[key] for m in ours] == pytest.approx([m[key] for m in theirs], rel=1e-4, abs=1e-6)
    assert ours[1]["kl"] > 1e-3  # of the policy to its base: there is something to ship
    assert ours[1]["logprob_difference"] < 1e-4
    critic = rows_of(place / "critic" / "metrics.jsonl")
    assert all(step["grad_norm"] > 0 and step["critic_grad_norm"] > 0 for step in critic)
    assert (place / "critic" / "adapter" / "adapter_model.safetensors").exists()
    assert (place / "critic" / "critic" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": None}, "rollout.adapters=ship: lora is null, so there is no adapter; allowed: merge"),
        ({"lora": {"rank": 4, "use_dora": True}}, "ship: vLLM takes no magnitudes"),
    ],
)
def test_what_cannot_be_shipped_is_refused(place: Path, changes: dict[str, Any], message: str) -> None:
    given = GrpoConfig.model_validate(config(place, "refused", rollout={"adapters": "ship"}) | changes)
    with pytest.raises(UserError, match=message):
        Asked.of(given, prepare(given))
