"""distill on the student's own samples, against transformers on the same samples; its teacher on disk and in host
memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.algorithms.test_preferences import config, learned
from tests.helpers.launch import ranks
from tests.helpers.models import make_assets
from tests.helpers.preference_models import encode, grad_norm, load_tokenizer, make_model, rows_of, write_rows

SAMPLED = {"max_tokens": 12, "temperature": 1.0}
MIXED = {"student_fraction": 0.5, "divergence": "jsd", "beta": 0.3}
GRADIENT = {"student_fraction": 1.0, "divergence": "reverse_kl", "estimator": "policy_gradient"}

SPLIT: dict[str, Any] = {"parallel": {"tensor": 2, "expert": 2}, "checkpoint": {"every": 1, "keep": 9}}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("distill")
    tokenizer = make_assets(directory) / "model"
    for name, layers, hidden in (("student", 2, 32), ("teacher", 3, 64)):
        make_model(directory / name, tokenizer, 288, layers=layers, hidden=hidden, head=32)
    write_rows(directory)
    return directory


def job(place: Path, output: str, algorithm: dict[str, Any], **changes: Any) -> tuple[str, dict[str, Any]]:
    sampled = {"rollout": SAMPLED} if "student_fraction" in algorithm else {}
    found = config(place, "distill", output, algorithm=algorithm, packing=False, **sampled, **changes)
    found["training"]["steps"] = 2
    return "distill", found


def run(place: Path, processes: int, jobs: list[tuple[str, dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    file = place / "jobs.json"
    file.write_text(json.dumps(jobs))
    ranks(processes, "-m", "tests.helpers.preference_worker", str(file), rollout=True)
    return {Path(each["output"]).name: rows_of(Path(each["output"]) / "metrics.jsonl") for _, each in jobs}


@pytest.fixture(scope="module")
def metrics(place: Path) -> dict[str, list[dict[str, Any]]]:
    found = run(place, 1, [job(place, "mixed", MIXED), job(place, "gradient", GRADIENT)])
    return found | run(place, 2, [job(place, "mixed-2", MIXED, **SPLIT), job(place, "gradient-2", GRADIENT)])


def mixture(q: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    q, p = q.softmax(-1), p.softmax(-1)
    m = 0.3 * p + 0.7 * q
    return (0.3 * p * (p / m).log() + 0.7 * q * (q / m).log()).sum()


@pytest.mark.parametrize("name", ["mixed", "gradient", "mixed-2", "gradient-2"])
def test_on_policy_steps_begin_as_transformers(place: Path, metrics: Any, name: str) -> None:
    student, teacher = (AutoModelForCausalLM.from_pretrained(place / x) for x in ("student", "teacher"))
    tokenizer = load_tokenizer(place / "student")
    samples = rows_of(place / name / "rollouts" / "step_000001.jsonl")
    answers = {tuple(sample["prompt_token_ids"]): sample["token_ids"] for sample in samples}
    value, surrogate, count = torch.zeros(()), torch.zeros(()), 0
    for row in rows_of(place / "chat.jsonl"):
        ids, begin = encode(tokenizer, row["messages"][:-1], row["messages"][-1]["content"])
        at = learned(tokenizer, row["messages"], ids)
        if (answer := answers.pop(tuple(ids[0, :begin].tolist()), None)) is not None:
            ids = torch.cat([ids[:, :begin], torch.tensor([answer])], 1)
            at = list(range(begin - 1, ids.shape[1] - 1))
        q, count = student(ids).logits[0, at], count + len(at)
        with torch.no_grad():
            p = teacher(ids).logits[0, at]
        if name.startswith("gradient"):
            own, theirs = (x.log_softmax(-1).gather(-1, ids[0, 1:][at][:, None])[:, 0] for x in (q, p))
            value, surrogate = value + (own - theirs).sum().detach(), surrogate + ((own - theirs).detach() * own).sum()
        else:
            value = surrogate = value + mixture(q, p)
    assert not answers  # every sample is of a row
    assert len(samples) == (12 if name.startswith("gradient") else 6)
    (surrogate / count).backward()
    first = metrics[name][0]
    assert first["loss_tokens"] == count
    assert first["loss"] == pytest.approx(value.item() / count, rel=1e-5)
    assert first["grad_norm"] == pytest.approx(grad_norm(student), rel=1e-5)
    assert first["sampled_fraction"] == len(samples) / 12


def test_a_teacher_on_disk_or_in_host_memory_is_the_same(place: Path) -> None:
    """What is cached under one layout is read under another."""
    top, full = {"top_k": 7}, {"divergence": "reverse_kl"}
    cached = {"teacher": {"path": str(place / "teacher"), "cache": str(place / "cache")}}
    away = {"teacher": {"path": str(place / "teacher"), "offload": True}}
    jobs = [job(place, "top", top), job(place, "filled", top, **cached), job(place, "full", full)]
    found = run(place, 1, [*jobs, job(place, "offloaded", full, **away)])
    (directory,) = (place / "cache").iterdir()
    files = sorted(directory.glob("*.safetensors"))
    assert len(files) == 1  # of the first step; later epochs have the same conversations
    found |= run(place, 2, [job(place, "read", top, parallel={"tensor": 2}, **cached)])

    def losses(name: str) -> list[float]:
        return [step["loss"] for step in found[name]]

    # The second step packs conversations otherwise than the step whose values it reads
    assert losses("filled") == pytest.approx(losses("top"), rel=1e-5)
    assert losses("offloaded") == losses("full")
    assert losses("read") == pytest.approx(losses("top"), rel=1e-4)
    assert sorted(directory.glob("*.safetensors")) == files


def test_a_run_with_samples_resumes_to_the_last_bit(place: Path, metrics: Any) -> None:
    shutil.copytree(place / "mixed-2" / "checkpoints" / "step_000001", place / "again" / "checkpoints" / "step_000001")
    (second,) = run(place, 2, [job(place, "again", MIXED, **SPLIT)])["again"]
    assert second["loss"] == metrics["mixed-2"][1]["loss"]
    files = [place / name / "hf" / "model.safetensors" for name in ("mixed-2", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()
