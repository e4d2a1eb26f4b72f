"""`evaluate`: its figures, its files, and what it refuses."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_posttrain.cli.generation import dtype_of
from megatron_posttrain.cli.main import main
from megatron_posttrain.evaluation import wilson_interval
from tests.helpers.launch import cold
from tests.helpers.rollout_models import EVEN, make_model, make_tokenizer

ROWS = [{"prompt": f"{i}?", "answer": "1"} for i in range(6)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("evaluate") / "model"
    make_model(path, "dense_tied", seed=0)
    make_tokenizer(path)
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return path


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (5, 10), (81, 100), (500, 500)])
def test_wilson_interval_solves_its_equation(successes: int, n: int) -> None:
    # The ends are the two p with (fraction - p)^2 = z^2 p (1 - p) / n.
    fraction, z2 = successes / n, 1.959964**2
    roots = np.sort(np.roots([1 + z2 / n, -2 * fraction - z2 / n, fraction**2]).real)
    assert wilson_interval(fraction, n) == pytest.approx(tuple(roots), abs=1e-6)


def test_alone_as_one_process(model: Path, data: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (tmp_path / "reward.py").write_text(EVEN)
    output = tmp_path / "out"
    done = cold(
        *("-m", "megatron_posttrain", "evaluate"),
        *("--model", str(model), "--data", str(data), "--limit", "4", "--max-tokens", "9"),
        *("--reward", "even", "--reward-file", str(tmp_path / "reward.py"), "--output", str(output)),
    )
    records = [json.loads(line) for line in (output / "responses.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(model)
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    assert [r["index"] for r in records] == [0, 1, 2, 3]
    even = 0
    for record, row in zip(records, ROWS, strict=False):
        text = f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n"
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        said = reference.generate(ids, max_new_tokens=9, do_sample=False)[0, ids.shape[1] :]
        assert record["response"] == tokenizer.decode(said, skip_special_tokens=True)
        even += len(record["response"]) % 2 == 0
    summary = json.loads((output / "evaluation.json").read_text())
    assert summary["accuracy"] == pytest.approx(even / 4)
    assert (summary["prompts"], summary["samples"], summary["temperature"]) == (4, 1, 0)
    assert summary["accuracy_low"] <= summary["accuracy"] <= summary["accuracy_high"]
    assert f"{even / 4:.3f}   95% interval" in done.stdout
    assert "Warning" not in done.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--model", "nowhere"], "nowhere: no such directory"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--reward", "mth"], "no reward named 'mth'; did you mean 'math'?"),
        (["--max-tokens", "250"], "the model allows 256"),
    ],
)
def test_bad_arguments(
    model: Path, data: Path, change: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = {"--model": str(model), "--data": str(data), "--max-tokens": "9"} | {change[0]: change[1]}
    assert main(["evaluate", *(text for pair in arguments.items() for text in pair)]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said


def test_columns_that_are_not_there(model: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--model", str(model), "--data", str(data), "--columns", "{question: stem}"]) == 2
    assert f"{data}:1: data.columns.question: no column stem; found" in capsys.readouterr().err


def test_rows_without_an_answer(model: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data.write_text(json.dumps(ROWS[0]) + '\n{"prompt": "?"}')
    assert main(["evaluate", "--model", str(model), "--data", str(data)]) == 2
    assert f"{data}:2: no `answer`" in capsys.readouterr().err


def test_the_dtype_is_that_of_what_is_not_quantised(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors = {"a": torch.zeros(2, dtype=torch.int64), "b": torch.zeros(2).to(torch.float8_e4m3fn)}
    save_file(tensors | {"c": torch.zeros(2, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    assert dtype_of(argparse.Namespace(model=tmp_path, dtype="auto")) == torch.bfloat16


def test_a_model_without_a_tensor(model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, broken / "model.safetensors")
    assert main(["evaluate", "--model", str(broken), "--data", str(data)]) == 2
    assert "missing tensor 'model.norm.weight'" in capsys.readouterr().err
