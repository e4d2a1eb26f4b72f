"""What users get wrong in dpo, reward-model and distill: one message each, before a model is made; and resuming."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_posttrain.algorithms.distill import distill
from megatron_posttrain.algorithms.dpo import dpo
from megatron_posttrain.algorithms.reward_model import reward_model
from megatron_posttrain.config.algorithms import DistillConfig, DpoConfig, RewardModelConfig
from megatron_posttrain.errors import UserError
from tests.helpers.launch import ranks
from tests.helpers.models import make_assets
from tests.helpers.preference_models import make_model, rows_of, write_rows

USER = {"role": "user", "content": "Why?"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("mistakes")
    tokenizer = make_assets(directory) / "model"
    make_model(directory / "student", tokenizer, 288, layers=2, hidden=32)
    write_rows(directory)
    return directory


def config(place: Path, rows: str | list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    file = place / "rows.jsonl"
    if isinstance(rows, str):
        file = place / f"{rows}.jsonl"
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model": {"path": str(place / "student"), "moe": {"load_balancing": "none"}},
        "precision": {"dtype": "fp32"},
        "data": {"train": str(file), "sequence_length": changes.pop("length", 96)},
        "optimizer": {"lr": 1e-3},
        "training": {"steps": 4, "global_batch_size": 4},
        "logging": {"tensorboard": False},
        "output": str(place / changes.pop("output", "run")),
    } | changes


GOOD = {"prompt": [USER], "chosen": "so", "rejected": "no"}
SAME = {"prompt": "a", "chosen": "b ", "rejected": "b "}
APART = {
    "chosen": [USER, {"role": "assistant", "content": "b"}],
    "rejected": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "c"}],
}
ONE = {"prompt": "a", "response": "b", "label": True}
KTO = {"loss": "kto"}
SMOOTH, CACHED = {"loss": "ipo", "label_smoothing": 0.1}, {"loss": "orpo", "reference_cache": "x"}
MISTAKES: list[tuple[Any, dict[str, Any], str]] = [
    ([GOOD, SAME], {}, "rows.jsonl:2: chosen and rejected are the same answer"),
    ([GOOD, {"prompt": "a", "chosen": "b"}], {}, "rows.jsonl:2: no rejected; a pair has chosen and rejected"),
    ([APART], {}, "rows.jsonl:1: chosen and rejected have no common beginning"),
    ([ONE | {"label": "good"}], {"algorithm": KTO}, 'rows.jsonl:1: label must be true or false, found "good"'),
    ([ONE], {"algorithm": KTO}, "rows.jsonl:1: kto compares with answers to other prompts"),
    ([ONE], {}, "rows.jsonl:1: a labelled answer; allowed: pairs, or algorithm.loss=kto"),
    ("chat", {}, "chat.jsonl:1: a row of the form messages .* which is for sft"),
    ("pairs", {"length": 8}, "sequence_length is 8, and none of the 12 rows fits"),
    ("pairs", {"algorithm": SMOOTH}, "algorithm.label_smoothing=0.1 has no effect on ipo"),
    ("pairs", {"algorithm": CACHED}, "algorithm.reference_cache has no effect: orpo has no reference"),
]


@pytest.mark.parametrize(("rows", "changes", "message"), MISTAKES)
def test_dpo_tells_what_is_wrong(place: Path, rows: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        dpo(DpoConfig.model_validate(config(place, rows, **changes)))


def test_reward_model_wants_pairs(place: Path) -> None:
    with pytest.raises(UserError, match="allowed: pairs"):
        reward_model(RewardModelConfig.model_validate(config(place, "labelled")))


def test_a_teacher_has_the_students_tokenizer(place: Path) -> None:
    teacher = place / "other"
    shutil.copytree(place / "student", teacher, dirs_exist_ok=True)
    text = (teacher / "tokenizer.json").read_text()
    (teacher / "tokenizer.json").write_text(text.replace('"<think>"', '"<thought>"'))
    given = config(place, "chat", teacher={"path": str(teacher)})
    with pytest.raises(UserError, match=r"token \d+ is '<thought>' there and '<think>' for the student"):
        distill(DistillConfig.model_validate(given))
    given["teacher"]["path"] = str(place / "studnet")
    with pytest.raises(UserError, match=r"teacher.path: no directory .*did you mean 'student'"):
        distill(DistillConfig.model_validate(given))
    given["teacher"]["path"] = str(place / "student")
    for algorithm, message in (
        ({"divergence": "jsd", "beta": 1.0}, "makes jsd zero"),
        (
            {"estimator": "policy_gradient"},
            "student_fraction=0.0: estimator=policy_gradient needs student_fraction=1.0",
        ),
        ({"student_fraction": 0.5}, "sequence_length=96 leaves no room for a prompt beside rollout.max_tokens=1024"),
    ):
        with pytest.raises(UserError, match=message):
            distill(DistillConfig.model_validate(given | {"algorithm": algorithm}))


def test_dpo_resumes_to_the_last_bit_and_refuses_a_cache_of_another_model(place: Path) -> None:
    given = config(place, "pairs", checkpoint={"every": 2}, output="resumed")
    given["data"]["validation"] = given["data"]["train"]
    run = place / "resumed"

    def train() -> list[dict[str, Any]]:
        (place / "job.json").write_text(json.dumps([["dpo", given]]))
        ranks(1, "-m", "tests.helpers.preference_worker", str(place / "job.json"))
        unsteady = ("_seconds", "per_second", "_memory_gib")
        return [{k: v for k, v in line.items() if not k.endswith(unsteady)} for line in rows_of(run / "metrics.jsonl")]

    first = train()
    assert 0 <= first[1]["validation_accuracy"] <= 1
    assert first[3]["validation_margin"] > first[1]["validation_margin"]
    weights = (run / "hf" / "model.safetensors").read_bytes()
    shutil.rmtree(run / "checkpoints" / "step_000004")
    shutil.rmtree(run / "reference")  # it is computed again from the weights that the run began with
    assert train() == first
    assert (run / "hf" / "model.safetensors").read_bytes() == weights
    file = run / "reference" / "train.npz"
    with np.load(file) as stored:
        key, values = json.loads(str(stored["key"])), stored["values"]
    np.savez(file, key=json.dumps(key | {"model": "another", "template": "another"}), values=values)
    with pytest.raises(UserError, match=r"train.npz has log-probs for another model, template than this run's; remove"):
        dpo(DpoConfig.model_validate(given))
