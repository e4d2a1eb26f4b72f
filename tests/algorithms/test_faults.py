"""What goes wrong in a reinforcement learning run: it is named, it costs no finished step, and nothing hangs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.algorithms.test_grpo import lines, small, steady
from tests.helpers.launch import ranks

# Rank 1 is killed in the second call of each of these in an attempt, once a run.
KILLS = {"update_weights": "RolloutEngine", "run": "RolloutEngine", "train_step": "Engine"}
PHASES = {"update_weights": "refit", "run": "rollout", "train_step": "train"}
KILLER = """
import os
import time
from pathlib import Path

from megatron_posttrain.rollout.engine import RolloutEngine
from megatron_posttrain.training.engine import Engine


def once(cls, name):
    kept, calls = getattr(cls, name), []

    def method(self, *args, **options):
        calls.append(name)
        mark = Path({place!r}, "killed_" + name)
        if os.environ["RANK"] == "1" and len(calls) == 2 and not mark.exists():
            mark.touch()
            time.sleep(2)  # so that others have heard of the phase
            os.kill(os.getpid(), 9)
        return kept(self, *args, **options)

    setattr(cls, name, method)


"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_rank_killed_in_refit_rollout_and_update_costs_a_step_each(tmp_path: Path) -> None:
    line = [*small(tmp_path), "training.steps=4", "parallel.tensor=2"]
    ranks(2, *line, rollout=True)
    whole = tmp_path / "run"
    metrics, weights = lines(whole / "metrics.jsonl"), (whole / "hf/model.safetensors").read_bytes()
    shutil.move(whole, tmp_path / "whole")
    rewards = tmp_path / "rewards.py"
    calls = "".join(f"once({cls}, {name!r})\n" for name, cls in KILLS.items())
    rewards.write_text(rewards.read_text() + KILLER.format(place=str(tmp_path)) + calls)
    for finished, name in enumerate(KILLS, start=1):
        done = ranks(2, *line, rollout=True, check=False, timeout=120)
        assert done.returncode != 0
        assert (tmp_path / f"killed_{name}").exists()
        assert (whole / f"checkpoints/step_{finished:06}").is_dir()
        assert f"step {finished + 1}, {PHASES[name]}\n" in done.stdout
    ranks(2, *line, rollout=True)
    assert [steady(m) for m in lines(whole / "metrics.jsonl")] == [steady(m) for m in metrics]
    assert (whole / "hf/model.safetensors").read_bytes() == weights


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_prompts_and_rewards_that_teach_nothing(tmp_path: Path) -> None:
    """A prompt that is too long, expected answers of a megabyte, a cache for three of 64 samples at once; groups whose
    rewards are equal, dynamic sampling that finds no others, and samples that no reward can grade."""
    line = small(tmp_path)
    file = tmp_path / "assets/rl.jsonl"
    rows = [json.loads(text) | {"answer": "7" * 1_000_000} for text in file.read_text().splitlines()]
    rows[3]["messages"][-1]["content"] = "12 " * 500
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rewards = tmp_path / "rewards.py"
    first = rewards.read_text()
    more = ["rollout.kv_cache_gib=0.0002", "rollout.max_num_seqs=64", "algorithm.dynamic_sampling=3"]
    for body, told in (
        ("return 1.0", "equal rewards within each prompt"),
        ("raise ValueError('no')", "every sample is masked"),
    ):
        rewards.write_text(first[: first.index("def")] + f"def even(sample):\n    {body}\n")
        done = ranks(1, *line, *more, f"output={tmp_path}/{len(body)}", rollout=True, timeout=300)
        assert "1 dropped" in done.stdout
        assert done.stdout.count(f"(nothing to learn: {told})") == 3
        for step in lines(tmp_path / str(len(body)) / "metrics.jsonl"):
            assert (step["loss"], step["equal_fraction"], step["generated_batches"]) == (0, 1, 3)
    rewards.write_text(first)
    ranks(1, *line, *more[:2], "rewards=[{name: math}]", f"output={tmp_path}/math", rollout=True, timeout=300)
    assert [step["reward"] for step in lines(tmp_path / "math/metrics.jsonl")] == [0, 0, 0]
    done = ranks(1, *line, "rollout.kv_cache_gib=0.00001", rollout=True, check=False)
    assert done.returncode == 2
    assert "rollout.kv_cache_gib=1e-05 is too small for one sequence" in done.stderr
