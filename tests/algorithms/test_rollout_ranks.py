"""Ranks that only generate: a run with them is, to the last bit, the one whose every rank does both, one step ahead."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_posttrain.config.algorithms import GrpoConfig
from megatron_posttrain.config.load import load_config
from megatron_posttrain.errors import UserError
from megatron_posttrain.training.prepare import prepare
from tests.algorithms.test_grpo import lines, small, steady
from tests.algorithms.test_tool_training import config, make_inputs
from tests.helpers.launch import ranks

APART = ["rollout.ranks=1"]


@pytest.mark.timeout(900)
def test_equals_ranks_that_do_both_also_when_resumed(tmp_path: Path) -> None:
    """Two trainers with tensor and expert parallelism, and one rollout rank; experts, a curriculum and held-out rows
    come over the bridge."""
    both = small(
        tmp_path, "rollout.ahead=1", "curriculum={revisit: 2}", "parallel.tensor=2", "parallel.expert=2",
        "algorithm.routing_replay=rollout", f"data.validation={tmp_path / 'assets' / 'heldout.jsonl'}",
        "training.validate_every=2",
    )  # fmt: skip
    run, apart = tmp_path / "run", tmp_path / "apart"
    ranks(2, *both, rollout=True)
    ranks(3, *both, *APART, f"output={apart}", rollout=True)
    metrics = lines(run / "metrics.jsonl")

    def equal() -> bool:
        assert [steady(m) for m in lines(apart / "metrics.jsonl")] == [steady(m) for m in metrics]
        name = "rollouts/step_000003.jsonl"
        assert lines(apart / name) == lines(run / name)
        return (apart / "hf" / "model.safetensors").read_bytes() == (run / "hf" / "model.safetensors").read_bytes()

    assert equal()
    assert [m["staleness"] for m in metrics] == [0, 1, 1]
    assert metrics[1]["validation_reward"] > 0
    found = lines(apart / "metrics.jsonl")[1]
    assert found["refit_gb"] > 0
    assert min(found["wait_seconds"], found["rollout_idle_seconds"]) > 0
    for step in (2, 3):
        shutil.rmtree(apart / "checkpoints" / f"step_00000{step}")
    shutil.rmtree(apart / "hf")
    ranks(3, *both, *APART, f"output={apart}", rollout=True)
    assert equal()


@pytest.mark.timeout(900)
def test_environments_and_a_model_that_grades_are_on_their_sides(tmp_path: Path) -> None:
    """Tools answer where samples are drawn; the reward model is the trainers'."""
    make_inputs(tmp_path)
    found = {}
    for name, processes, more in (("both", 1, {}), ("apart", 2, {"ranks": 1})):
        job = config(tmp_path, name)
        job["rollout"] |= {"ahead": 1, "max_num_seqs": 4, **more}
        job["training"] |= {"steps": 3}
        (tmp_path / "job.yaml").write_text(json.dumps(job))
        ranks(processes, "-m", "megatron_posttrain", "grpo", "--config", str(tmp_path / "job.yaml"), rollout=True)
        found[name] = lines(tmp_path / name / "metrics.jsonl"), lines(tmp_path / name / "rollouts/step_000002.jsonl")
    assert [steady(m) for m in found["apart"][0]] == [steady(m) for m in found["both"][0]]
    assert found["apart"][1] == found["both"][1]
    assert any("turns" in sample for sample in found["both"][1])
    assert found["both"][0][0]["reward/reward_model"] != 0


@pytest.mark.timeout(900)
def test_new_weights_and_samples_change_hands_while_others_are_drawn(tmp_path: Path) -> None:
    """Two engines, two steps ahead; what they hold is proven at every refit."""
    line = small(
        tmp_path, "rollout.ranks=2", "rollout.ahead=2", "rollout.in_flight=true", "training.steps=5",
        "rollout.max_tokens=48", "rollout.max_num_seqs=2", "checkpoint.every=5", "training.validate_every=3",
        f"data.validation={tmp_path / 'assets' / 'heldout.jsonl'}",
    )  # fmt: skip
    ranks(3, *line, rollout=True)
    metrics = lines(tmp_path / "run" / "metrics.jsonl")
    assert len(metrics) == 5
    assert sum(m["met_in_flight"] for m in metrics) >= 1
    assert all(0 <= m["staleness"] <= 2 for m in metrics)
    assert all(m["proof_seconds"] > 0 for m in metrics)
    assert metrics[2]["validation_reward"] > 0
    assert max(m["logprob_difference"] for m in metrics[1:]) > 1e-4  # of the first step's weights
    asked = [row["index"] for step in range(1, 6) for row in lines(tmp_path / f"run/rollouts/step_00000{step}.jsonl")]
    assert len(set(asked)) == 20  # none is lost, none comes twice


@pytest.mark.timeout(900)
def test_a_rollout_rank_that_fails_ends_the_trainers(tmp_path: Path) -> None:
    line = small(tmp_path, "rollout.ahead=1", *APART)
    (tmp_path / "rewards.py").write_text(
        "from megatron_posttrain.rewards import reward\n\n\n@reward('even')\ndef even(sample):\n    return 'good'\n"
    )
    done = ranks(2, *line, rollout=True, check=False, timeout=120)
    assert done.returncode != 0
    reason = "error: reward 'even' returned 'good'"
    assert f"rank 1: {reason}" in done.stderr
    assert f"since rank 1 failed first: {reason}" in done.stderr


@pytest.mark.timeout(900)
def test_a_rollout_rank_that_freezes_is_named(tmp_path: Path) -> None:
    line = small(tmp_path, "rollout.ahead=1", *APART, "logging.hang_seconds=6")
    (tmp_path / "rewards.py").write_text(
        "import os, signal, time\nfrom megatron_posttrain.rewards import reward\n\n\n"
        "@reward('even')\ndef even(sample):\n"
        "    time.sleep(2)  # a heartbeat is written\n    os.kill(os.getpid(), signal.SIGSTOP)\n    return 1.0\n"
    )
    done = ranks(2, *line, rollout=True, check=False, timeout=120)
    assert done.returncode != 0
    assert "HANG: rank 0 has been in step 1, rollout" in done.stderr
    assert "rank 1" in done.stderr.split("HANG")[1]
    assert "take; it does not run (frozen, killed, or its machine is lost)" in done.stderr


@pytest.mark.parametrize(
    ("world", "more", "said"),
    [
        (1, [], "rollout.ranks=1 leaves none of the 1 ranks to train; allowed: 0, or more ranks (torchrun)"),
        (2, ["rollout.ranks=3"], "leaves none of the 2 ranks to train; allowed: 0 (every rank does both) to 1"),
        (2, ["parallel.tensor=2"], "1 ranks are not divisible by tensor x pipeline x context = 2"),
        (2, ["rollout.tensor=2"], "rollout.tensor=2 does not divide rollout.ranks=1"),
        (2, ["rollout.offload=true"], "rollout.ranks=1 with rollout.offload: trainers share no GPU with vLLM"),
        (2, ["rollout.in_flight=true"], "rollout.in_flight: nothing is drawn while weights change"),
        (2, ["rollout.replay=x"], "rollout.ranks=1 with rollout.replay: no engine"),
    ],
)
def test_mistakes(keys: list[str], world: int, more: list[str], said: str) -> None:
    with pytest.raises(UserError) as error:
        prepare(load_config(GrpoConfig, None, [*keys, *APART, *more]), world)
    assert said in str(error.value)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return small(tmp_path_factory.mktemp("run"))[3:]
