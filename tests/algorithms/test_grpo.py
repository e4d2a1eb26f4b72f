"""GRPO end to end on two ranks: what a run leaves, resuming to the last bit, the exported model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.launch import ranks
from tests.helpers.models import make_assets
from tests.helpers.rollout_models import EVEN

KEYS = {
    "step", "loss", "grad_norm", "learning_rate", "tokens", "tokens_per_second", "step_seconds", "reward",
    "response_length", "entropy", "kl", "clip_fraction", "truncated_fraction", "logprob_difference",
    "rollout_seconds", "refit_seconds", "train_seconds",
}  # fmt: skip


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def steady(record: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in record.items() if not k.endswith(("_seconds", "per_second", "_memory_gib"))}


@pytest.mark.timeout(900)
def test_grpo_trains_resumes_and_exports(tmp_path: Path) -> None:
    assets = make_assets(tmp_path)
    run = tmp_path / "run"
    arguments = [
        "-m", "megatron_posttrain", "grpo", f"model.path={assets / 'model'}", f"data.train={assets / 'rl.jsonl'}",
        f"output={run}", "precision.dtype=fp32", "parallel.tensor=2", "parallel.expert=2", "data.sequence_length=64",
        "rollout.prompts_per_step=4", "rollout.samples_per_prompt=4", "rollout.max_tokens=16",
        "training.steps=2", "training.global_batch_size=16", "training.micro_batch_size=4", "optimizer.lr=1e-3",
        "algorithm.kl_coefficient=0.01", "algorithm.routing_replay=rollout", "checkpoint.every=1",
        "rollout.token_figures=true", "logging.tensorboard=false",
        "rollout.proof_every=2",  # the second refit is looked at only where it is an attempt's first
        f"data.validation=[{assets / 'heldout.jsonl'},{assets / 'few.jsonl'}]",
        "training.validate_every=2", "rollout.validation_samples=2", "checkpoint.best=validation_reward",
        # Random answers are all wrong: a reward of ours keeps the advantages from being zero.
        f"rewards=[{{name: short, weight: 1.0, file: {tmp_path / 'rewards.py'}}}]",
    ]  # fmt: skip
    (tmp_path / "rewards.py").write_text(
        "from megatron_posttrain.rewards import reward\n\n\n"
        "@reward('short')\ndef short(sample):\n"
        "    if sum(map(ord, sample.response)) % 4 == 0:\n        raise ValueError('unlucky')\n"
        "    return -len(sample.response) / 16\n"
    )
    rows = (assets / "heldout.jsonl").read_text().splitlines(keepends=True)
    (assets / "few.jsonl").write_text("".join(rows[:4]))
    ranks(2, *arguments, rollout=True)
    metrics = lines(run / "metrics.jsonl")
    figures = {"accuracy", "accuracy_low", "accuracy_high", "pass_at_2", "reward"}
    looks = {f"validation_{figure}/{name}" for figure in figures for name in ("heldout", "few")}
    assert not looks & metrics[0].keys()
    assert looks <= metrics[1].keys()
    assert metrics[1]["validation_reward/few"] < 0 == metrics[1]["validation_accuracy"]
    assert [m["step"] for m in metrics] == [1, 2]
    for record in metrics:
        assert record.keys() >= KEYS
        assert record["logprob_difference"] < 1e-4  # fp32: trainer and engine agree
        assert record["grad_norm"] > 0
    assert metrics[0]["kl"] == pytest.approx(0, abs=1e-6)  # the first update starts at the reference
    assert metrics[1]["kl"] > 1e-4
    samples = lines(run / "rollouts" / "step_000001.jsonl")
    assert len(samples) == 16
    assert {"prompt", "response", "token_ids", "rewards", "advantage", "finish_reason"} <= samples[0].keys()
    masked = [s for s in samples if s.get("masked")]  # what could not be graded ends nothing, and does not train
    assert 0 < len(masked) < 16
    assert metrics[0]["masked_fraction"] == metrics[0]["reward/short/failed_fraction"] == len(masked) / 16
    assert all("ValueError: unlucky" in s["failures"]["short"] and s["advantage"] == 0 for s in masked)
    trained = [s for s in samples if s not in masked]
    entropies = [x for s in trained for x in s["entropies"]]
    assert len(entropies) == sum(len(s["token_ids"]) for s in trained)
    assert sum(entropies) / len(entropies) == pytest.approx(metrics[0]["entropy"], rel=1e-3)
    assert all(s["advantages"] == pytest.approx([s["advantage"]] * len(s["token_ids"]), abs=1e-4) for s in trained)
    assert all(abs(x) < 1e-4 for s in trained for x in s["logprob_differences"])
    for group in range(4):
        assert sum(s["advantage"] for s in samples[4 * group : 4 * group + 4]) == pytest.approx(0, abs=1e-5)
    weights = (run / "hf" / "model.safetensors").read_bytes()

    shutil.rmtree(run / "checkpoints" / "step_000002")
    shutil.rmtree(run / "hf")
    ranks(2, *arguments, rollout=True)
    assert [steady(m) for m in lines(run / "metrics.jsonl")] == [steady(m) for m in metrics]
    assert (run / "hf" / "model.safetensors").read_bytes() == weights

    replayed = [f"output={tmp_path / 'again'}", "algorithm.routing_replay=none", "data.validation=null"]
    replayed += ["training.validate_every=null", "rollout.validation_samples=1", "checkpoint.best=null"]
    ranks(2, *arguments, *replayed, "--replay", str(run / "rollouts"))
    # After an update a token near a tie may take another expert: choices are not logged.
    for record, first, near in zip(lines(tmp_path / "again" / "metrics.jsonl"), metrics, (1e-4, 2e-3), strict=True):
        for name in ("loss", "grad_norm", "kl", "reward", "masked_fraction"):
            assert record[name] == pytest.approx(first[name], rel=near, abs=1e-6), name
        assert record["logprob_difference"] == pytest.approx(first["logprob_difference"], abs=near)
    logged = [lines(place / "rollouts" / "step_000002.jsonl") for place in (run, tmp_path / "again")]
    for one, other in zip(*logged, strict=True):
        assert one.keys() == other.keys()
        assert [one[key] for key in ("token_ids", "rewards", "logprobs")] == [
            other[key] for key in ("token_ids", "rewards", "logprobs")
        ]
    done = ranks(2, *arguments, *replayed, "training.steps=3", "--replay", str(run / "rollouts"), check=False)
    assert done.returncode == 1  # torchrun's, of several ranks
    assert "step_000003.jsonl is not there; the run has 3 steps" in done.stderr


def small(place: Path, *more: str) -> list[str]:
    """A run of three steps of 4 x 4 samples, in `place`."""
    assets = make_assets(place)
    (place / "rewards.py").write_text(EVEN)
    return [
        "-m", "megatron_posttrain", "grpo", f"model.path={assets / 'model'}", f"data.train={assets / 'rl.jsonl'}",
        "precision.dtype=fp32", "data.sequence_length=64", "rollout.max_num_seqs=6", "rollout.prompts_per_step=4",
        "rollout.samples_per_prompt=4", "rollout.max_tokens=12", "training.steps=3", "training.global_batch_size=16",
        "training.micro_batch_size=4", "optimizer.lr=1e-3", "checkpoint.every=1", "checkpoint.keep=9",
        "logging.tensorboard=false", f"rewards=[{{name: even, file: {place / 'rewards.py'}}}]",
        f"output={place / 'run'}", *more,
    ]  # fmt: skip


@pytest.mark.timeout(900)
def test_drawn_ahead_resumes_bitwise(tmp_path: Path) -> None:
    """With a curriculum, whose state is that of later draws."""
    run, ahead = tmp_path / "run", small(tmp_path, "rollout.ahead=1", "curriculum={revisit: 2}")
    ranks(2, *ahead)
    metrics = lines(run / "metrics.jsonl")
    assert [m["staleness"] for m in metrics] == [0, 1, 1]
    files = [run / "rollouts" / f"step_00000{n}.jsonl" for n in (1, 2, 3)]
    assert [{sample["version"] for sample in lines(file)} for file in files] == [{0}, {0}, {1}]
    assert metrics[0]["logprob_difference"] < 1e-4 < metrics[1]["logprob_difference"]
    assert metrics[1]["clip_fraction"] > 0  # the ratio is to the log-probs that were recorded
    rates = json.loads((run / "checkpoints/step_000003/trainer_state.json").read_text())["loop"]["curriculum"]["rates"]
    assert len(rates) == 12
    weights = (run / "hf" / "model.safetensors").read_bytes()
    for step in (2, 3):
        shutil.rmtree(run / "checkpoints" / f"step_00000{step}")
    shutil.rmtree(run / "hf")
    ranks(2, *ahead)
    assert [steady(m) for m in lines(run / "metrics.jsonl")] == [steady(m) for m in metrics]
    assert (run / "hf" / "model.safetensors").read_bytes() == weights


@pytest.mark.timeout(900)
def test_the_next_step_completes_what_one_cut_off(tmp_path: Path) -> None:
    """Though the run was stopped between them."""
    run, parts = tmp_path / "run", small(tmp_path, "rollout.oversample=2", "rollout.partial=true")
    ranks(2, *parts, "training.steps=1")
    ranks(2, *parts, "training.steps=2")
    first, second = ([s["index"] for s in lines(run / "rollouts" / f"step_00000{n}.jsonl")[::4]] for n in (1, 2))
    assert len({*first, *second[:2]}) == 6  # what the second step completes is what was asked first
    assert lines(run / "metrics.jsonl")[1]["staleness"] > 0


def test_mistakes_in_rollout_settings(tmp_path: Path) -> None:
    assets = make_assets(tmp_path)
    base = ["grpo", f"model.path={assets / 'model'}", f"data.train={assets / 'rl.jsonl'}", f"output={tmp_path / 'run'}"]
    base += ["training.steps=1", "training.global_batch_size=256", "precision.dtype=fp32"]
    for extra, said in (
        (["rollout.max_tokens=4096"], "leaves no room for a prompt"),
        (["rollout.max_tokens=64", "rollout.quantization=fp8"], "fp8 runs on CUDA only; allowed here: null"),
        (["rollout.max_tokens=64", "rollout.offload=true", "precision.dtype=fp32"], "needs precision.dtype bf16"),
        (["rollout.max_tokens=64", "training.global_batch_size=100"], "does not divide the samples"),
        (["rollout.max_tokens=64", "rollout.partial=true"], "rollout.partial with rollout.oversample=0"),
        (["rollout.max_tokens=64", "rewards=[{name: maths}]"], "did you mean 'math'"),
    ):
        done = ranks(1, "-m", "megatron_posttrain", *base, *extra, check=False)
        assert done.returncode == 2
        assert said in done.stderr
