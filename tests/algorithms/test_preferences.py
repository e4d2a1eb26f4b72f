"""dpo, reward-model and distill against transformers on the same rows, and the same under every layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from megatron_posttrain.algorithms.reward_model import name_padding
from tests.helpers.launch import ranks
from tests.helpers.models import make_assets
from tests.helpers.preference_models import (
    answer_logprob,
    encode,
    grad_norm,
    load_tokenizer,
    make_model,
    rows_of,
    write_rows,
)

STEPS = 5
COMPARED = 3  # of them, under other layouts


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """student (301 columns) and teacher (288) with one tokenizer, and rows."""
    directory = tmp_path_factory.mktemp("preferences")
    tokenizer = make_assets(directory) / "model"
    make_model(directory / "student", tokenizer, 301, layers=2, hidden=32)
    make_model(directory / "teacher", tokenizer, 288, layers=3, hidden=64)
    write_rows(directory)
    return directory


def config(place: Path, command: str, output: str, **changes: Any) -> dict[str, Any]:
    algorithm = changes.pop("algorithm", {})
    rows = "chat" if command == "distill" else "labelled" if algorithm.get("loss") == "kto" else "pairs"
    found: dict[str, Any] = {
        "model": {"path": str(place / "student"), "moe": {"load_balancing": "none"}},
        "precision": {"dtype": "fp32"},
        "data": {"train": str(place / f"{rows}.jsonl"), "sequence_length": 96, "packing": changes.pop("packing", True)},
        "optimizer": {"lr": 1e-3, "weight_decay": 0.0, "schedule": "constant"},
        "training": {"steps": STEPS, "global_batch_size": 12, "micro_batch_size": 3},
        "logging": {"tensorboard": False},
        "algorithm": algorithm,
        "output": str(place / output),
    }
    if command == "distill":
        found["teacher"] = {"path": str(place / "teacher")}
    return found | changes


def run(place: Path, processes: int, jobs: list[tuple[str, dict[str, Any]]]) -> list[list[dict[str, Any]]]:
    """The metrics of every job's steps."""
    file = place / f"jobs{processes}.json"
    file.write_text(json.dumps(jobs))
    ranks(processes, "-m", "tests.helpers.preference_worker", str(file))
    return [rows_of(Path(job["output"]) / "metrics.jsonl") for _, job in jobs]


# Of every command some ways to run it; `{}` is one process, unpacked.
COMMANDS: dict[str, tuple[str, dict[str, Any]]] = {
    "dpo": ("dpo", {"beta": 0.5, "sft_weight": 0.1}),
    "kto": ("dpo", {"loss": "kto", "beta": 0.5}),
    "reward-model": ("reward-model", {"center": 0.01}),
    "distill": ("distill", {"divergence": "jsd", "beta": 0.3, "temperature": 0.8}),
    "top-k": ("distill", {"top_k": 7, "divergence": "reverse_kl"}),
}


def jobs_of(
    place: Path, name: str, layouts: list[dict[str, int]], tag: str, steps: int
) -> list[tuple[str, dict[str, Any]]]:
    command, algorithm = COMMANDS[name]
    found = []
    for k, layout in enumerate(layouts):
        packing = bool(k % 2) and command != "distill"  # rows of conversations are other rows when packed
        changes = {"algorithm": algorithm, "parallel": layout, "packing": packing}
        found.append((command, config(place, command, f"{tag}-{name}-{k}", **changes)))
        found[-1][1]["training"]["steps"] = steps
    return found


@pytest.fixture(scope="module")
def alone(place: Path) -> dict[str, list[dict[str, Any]]]:
    """One process, nothing packed."""
    jobs = [job for name in COMMANDS for job in jobs_of(place, name, [{}], "alone", STEPS)]
    return dict(zip(COMMANDS, run(place, 1, jobs), strict=True))


def test_dpo_begins_as_transformers(place: Path, alone: dict[str, list[dict[str, Any]]]) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(place / "student"), load_tokenizer(place / "student")
    losses, chosen = [], []
    for row in rows_of(place / "pairs.jsonl"):
        w, n = answer_logprob(model, tokenizer, row["prompt"], row["chosen"])
        l, _ = answer_logprob(model, tokenizer, row["prompt"], row["rejected"])  # noqa: E741
        losses.append(-F.logsigmoid(0.5 * ((w - w.detach()) - (l - l.detach()))) - 0.1 * w / n)
        chosen.append(w.item())
    loss = torch.stack(losses).mean()
    loss.backward()
    first = alone["dpo"][0]
    assert first["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert first["grad_norm"] == pytest.approx(grad_norm(model), rel=1e-5)
    assert first["chosen_logprobs"] == pytest.approx(sum(chosen) / 12, rel=1e-5)
    assert first["margin"] == pytest.approx(0, abs=1e-4)
    assert {"accuracy", "margin", "chosen_reward", "rejected_reward", "rejected_logprobs"} <= first.keys()
    assert alone["dpo"][-1]["margin"] > 0.1
    assert alone["dpo"][-1]["loss"] < first["loss"]


def test_kto_begins_as_transformers(place: Path, alone: dict[str, list[dict[str, Any]]]) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(place / "student"), load_tokenizer(place / "student")
    losses = []
    for row in rows_of(place / "labelled.jsonl"):
        w, _ = answer_logprob(model, tokenizer, row["messages"], row["response"])
        sign = 1 if row["label"] else -1
        losses.append(1 - torch.sigmoid(0.5 * sign * (w - w.detach())))  # the divergence of a model from itself is 0
    loss = torch.stack(losses).mean()
    loss.backward()
    first = alone["kto"][0]
    assert first["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert first["grad_norm"] == pytest.approx(grad_norm(model), rel=1e-4)
    assert first["kl"] == pytest.approx(0, abs=1e-4)
    assert alone["kto"][-1]["margin"] > 0.1


def test_reward_model_begins_as_transformers_and_its_head_comes_back(
    place: Path, alone: dict[str, list[dict[str, Any]]]
) -> None:
    hidden = 32
    model = AutoModelForSequenceClassification.from_pretrained(place / "student", num_labels=1)
    drawn = torch.randn(1, hidden, generator=torch.Generator().manual_seed(0)) / (hidden + 1) ** 0.5
    model.score.weight.data.copy_(drawn)
    tokenizer = load_tokenizer(place / "student")

    def reward(model: Any, row: dict[str, Any], side: str) -> torch.Tensor:
        ids, _ = encode(tokenizer, row["prompt"], row[side])
        return model.score(model.model(ids).last_hidden_state[0, -1])[0]

    rows = rows_of(place / "pairs.jsonl")
    pairs = [(reward(model, row, "chosen"), reward(model, row, "rejected"), row["margin"]) for row in rows]
    loss = torch.stack([-F.logsigmoid(a - b - m) + 0.01 * (a + b) ** 2 for a, b, m in pairs]).mean()
    loss.backward()
    first = alone["reward-model"][0]
    assert first["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert first["grad_norm"] == pytest.approx(grad_norm(model), rel=1e-5)
    assert first["accuracy"] == pytest.approx(sum(bool(a > b) for a, b, _ in pairs) / 12)
    assert alone["reward-model"][-1]["loss"] < first["loss"]
    exported = AutoModelForSequenceClassification.from_pretrained(place / "alone-reward-model-0" / "hf")
    assert exported.config.num_labels == 1
    assert (exported.score.weight - model.score.weight).abs().max() > 1e-4  # trained, and not made anew:
    again = [(reward(exported, row, "chosen") - reward(exported, row, "rejected")).item() for row in rows]
    padded = tokenizer.apply_chat_template(
        [[*row["prompt"], {"role": "assistant", "content": row["chosen"]}] for row in rows[:3]],
        tokenize=True, padding=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    with torch.no_grad():  # the class itself, on a batch
        scores = exported(**padded).logits[:, 0]
    torch.testing.assert_close(scores, torch.stack([reward(exported, row, "chosen").detach() for row in rows[:3]]))
    # Where conversations end with the padding token, the class would take the token before it.
    copy = shutil.copytree(place / "alone-reward-model-0" / "hf", place / "padded")
    ids, _ = encode(tokenizer, rows[0]["prompt"], rows[0]["chosen"])
    assert not name_padding(copy / "config.json", int(ids[0, -1]), {int(ids[0, -1])})
    unpadded = AutoModelForSequenceClassification.from_pretrained(copy)
    torch.testing.assert_close(unpadded(ids).logits[0, 0], reward(exported, rows[0], "chosen"))
    with pytest.raises(ValueError, match="batch sizes > 1"):
        unpadded(ids.repeat(2, 1))
    again_config = config(place, "reward-model", "again", algorithm={"center": 0.01}, packing=False)
    again_config["model"]["path"] = str(place / "alone-reward-model-0" / "hf")
    (resumed,) = run(place, 1, [("reward-model", again_config)])
    assert resumed[0]["margin"] == pytest.approx(sum(again) / 12, rel=1e-4)


@pytest.mark.parametrize("name", ["distill", "top-k"])
def test_distill_begins_as_transformers(place: Path, alone: dict[str, list[dict[str, Any]]], name: str) -> None:
    student, teacher = (AutoModelForCausalLM.from_pretrained(place / x) for x in ("student", "teacher"))
    tokenizer = load_tokenizer(place / "student")
    total, count = torch.zeros(()), 0
    for row in rows_of(place / "chat.jsonl"):
        ids, _ = encode(tokenizer, row["messages"], None)
        at = learned(tokenizer, row["messages"], ids)
        with torch.no_grad():
            p = teacher(ids).logits[0, at, :288]
        q = student(ids).logits[0, at, :288]
        total, count = total + REFERENCES[name](q, p), count + len(at)
    loss = total / count
    loss.backward()
    first = alone[name][0]
    assert first["loss_tokens"] == count
    assert first["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert first["grad_norm"] == pytest.approx(grad_norm(student), rel=1e-5)
    assert alone[name][-1]["loss"] < first["loss"]


def learned(tokenizer: Any, messages: list[dict[str, str]], ids: torch.Tensor) -> list[int]:
    """Positions that predict an assistant's token."""
    found: list[int] = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            begin = tokenizer.apply_chat_template(
                messages[:i], tokenize=True, add_generation_prompt=True, return_dict=False
            )
            end = next(t for t in range(len(begin), ids.shape[1]) if ids[0, t] == tokenizer.eos_token_id)
            found += range(len(begin) - 1, end)
    return found


def jsd(q: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    q, p = (q / 0.8).softmax(-1), (p / 0.8).softmax(-1)
    m = 0.3 * p + 0.7 * q
    return (0.3 * p * (p / m).log() + 0.7 * q * (q / m).log()).sum()


def likeliest(q: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    q, p = q.softmax(-1), p.softmax(-1)
    top = p.topk(7)
    a, b = q.gather(-1, top.indices), top.values
    a, b = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (a, b))
    return (a * (a / b).log()).sum()


REFERENCES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {"distill": jsd, "top-k": likeliest}

TENSOR, PIPELINE, CONTEXT, EXPERT = {"tensor": 2}, {"pipeline": 2}, {"context": 2}, {"expert": 2}
ALL = {"tensor": 2, "pipeline": 2, "expert": 2}
TWO: dict[str, list[dict[str, int]]] = {
    "dpo": [TENSOR, PIPELINE, CONTEXT, EXPERT, {}],
    "kto": [CONTEXT],
    "reward-model": [TENSOR, CONTEXT, PIPELINE, {}],
    "distill": [TENSOR, PIPELINE, CONTEXT, EXPERT, {}],
    "top-k": [TENSOR],
}
FOUR = {"dpo": [ALL], "reward-model": [ALL], "distill": [ALL]}


@pytest.mark.parametrize(("processes", "layouts"), [(2, TWO), (4, FOUR)])
def test_layouts_and_packing_change_nothing(
    place: Path, alone: dict[str, list[dict[str, Any]]], processes: int, layouts: dict[str, list[dict[str, int]]]
) -> None:
    jobs = [job for name, each in layouts.items() for job in jobs_of(place, name, each, f"on{processes}", COMPARED)]
    found = iter(run(place, processes, jobs))
    for name, each in layouts.items():
        for layout in each:
            metrics = next(found)
            for key in ("loss", "grad_norm"):
                ours, wanted = ([m[key] for m in steps] for steps in (metrics, alone[name][:COMPARED]))
                assert ours == pytest.approx(wanted, rel=1e-4, abs=1e-5), (name, layout, key)
