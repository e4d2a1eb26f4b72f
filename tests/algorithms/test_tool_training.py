"""GRPO in an environment with a calculator and a reward model, with vLLM: tokens, masks, rewards, layouts, resuming."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, Qwen3Config, Qwen3ForSequenceClassification

from megatron_posttrain.config.schema import EnvironmentConfig
from megatron_posttrain.data.template import load_tokenizer
from megatron_posttrain.environments import load_environment
from tests.algorithms.test_grpo import lines, steady
from tests.helpers.chat_tokenizers import CHATML
from tests.helpers.launch import ranks
from tests.helpers.models import SIZES
from tests.helpers.tool_models import make_tool_model, sums, tool_tokenizer


def make_reward_model(directory: Path) -> None:
    """With a chat template of its own, which the policy's differs from."""
    tokenizer = tool_tokenizer(CHATML.replace("m.role", "m.role | upper"))
    torch.manual_seed(1)
    sizes = SIZES | {"vocab_size": len(tokenizer), "num_hidden_layers": 2, "pad_token_id": 0}
    Qwen3ForSequenceClassification(
        Qwen3Config(**sizes, bos_token_id=None, eos_token_id=None, num_labels=1)
    ).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def make_inputs(place: Path) -> None:
    """A model that has seen the calculator, a reward model and questions, as `config` names them."""
    make_tool_model(place / "model", 70, load_environment(EnvironmentConfig(name="calculator")).tools)
    make_reward_model(place / "scorer")
    rows = [json.dumps({"question": question, "answer": answer}) for question, answer in sums(16, 99, 9)]
    (place / "rows.jsonl").write_text("\n".join(rows))


def config(place: Path, output: str, **changes: Any) -> dict[str, Any]:
    return {
        "model": {"path": str(place / "model")},
        "precision": {"dtype": "fp32"},
        "data": {"train": str(place / "rows.jsonl"), "sequence_length": 192},
        "optimizer": {"lr": 1e-3, "schedule": "constant"},
        "training": {"steps": 2, "global_batch_size": 16, "micro_batch_size": 4},
        "rollout": {"prompts_per_step": 4, "samples_per_prompt": 4, "max_tokens": 120, "tensor": 1},
        "environment": {"name": "calculator", "max_turns": 3},
        "rewards": [{"name": "math"}, {"name": "reward_model", "path": str(place / "scorer"), "weight": 0.1}],
        "logging": {"tensorboard": False},
        "checkpoint": {"every": 1},
        "output": str(place / output),
    } | changes


@pytest.mark.timeout(900)
def test_grpo_with_a_calculator_and_a_reward_model(tmp_path: Path) -> None:
    make_inputs(tmp_path)
    first = config(tmp_path, "data2")
    rollout = first["rollout"] | {"tensor": 2}
    second = config(
        tmp_path, "tensor2", parallel={"tensor": 2}, rollout=rollout, training=first["training"] | {"steps": 1}
    )
    (tmp_path / "jobs.json").write_text(json.dumps([["grpo", first], ["grpo", second]]))
    ranks(2, "-m", "tests.helpers.preference_worker", str(tmp_path / "jobs.json"), rollout=True)

    samples, metrics = lines(tmp_path / "data2/rollouts/step_000001.jsonl"), lines(tmp_path / "data2/metrics.jsonl")
    answered = [sample for sample in samples if "turns" in sample]
    assert len(answered) > 8
    scorer, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "scorer").eval(),
        load_tokenizer(tmp_path / "scorer"),
    )
    policys = load_tokenizer(tmp_path / "model")
    for sample in samples:
        assert sample["logprob_difference"] < 1e-4  # fp32: of the model's own tokens, trainer and engine agree
        turns = sample.get("turns", [{"role": "assistant", "content": sample["response"]}])
        mask = sample.get("mask", [1] * len(sample["token_ids"]))
        drawn = [token for token, counts in zip(sample["token_ids"], mask, strict=True) if counts]
        said = "".join(turn["content"] for turn in turns if turn["role"] == "assistant")
        assert policys.decode(drawn).replace("<|im_end|>", "") == said
        ids = tokenizer.apply_chat_template([*sample["prompt"], *turns], return_tensors="pt", return_dict=False)
        with torch.no_grad():
            value = scorer(ids).logits[0, 0].item()
        assert sample["rewards"]["reward_model"] == pytest.approx(value, abs=1e-5)
        assert sample["reward"] == pytest.approx(sample["rewards"]["math"] + 0.1 * value, abs=1e-5)
    assert any(turn["content"].isdigit() for sample in answered for turn in sample["turns"] if turn["role"] == "tool")
    counted = [sum(sample.get("mask", sample["token_ids"] and [1] * len(sample["token_ids"]))) for sample in samples]
    assert metrics[0]["response_length"] == sum(counted) / 16
    assert metrics[0]["environment/turns"] > 1.5
    assert metrics[0]["grad_norm"] > 0
    assert metrics[0]["reward/reward_model"] == pytest.approx(sum(s["rewards"]["reward_model"] for s in samples) / 16)
    assert metrics[1]["logprob_difference"] < 1e-4
    for sample, other in zip(samples, lines(tmp_path / "tensor2/rollouts/step_000001.jsonl"), strict=True):
        assert sample["token_ids"] == other["token_ids"]
        assert sample["rewards"] == pytest.approx(other["rewards"], abs=1e-5)

    weights = (tmp_path / "data2/hf/model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "data2/checkpoints/step_000002")
    shutil.rmtree(tmp_path / "data2/hf")
    (tmp_path / "jobs.json").write_text(json.dumps([["grpo", first]]))
    ranks(2, "-m", "tests.helpers.preference_worker", str(tmp_path / "jobs.json"), rollout=True)
    assert [steady(m) for m in lines(tmp_path / "data2/metrics.jsonl")] == [steady(m) for m in metrics]
    assert (tmp_path / "data2/hf/model.safetensors").read_bytes() == weights
