"""Perplexity under vLLM in two processes against transformers, replicas of a suite, and the leaderboard."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from megatron_posttrain.cli.main import main
from megatron_posttrain.evaluation.perplexity import windows
from tests.helpers.launch import ranks
from tests.helpers.rollout_models import make_model, make_tokenizer

TEXTS = ["A first text, rather longer than a window of tokens of it.", "Zwei.\n  Ende  ", "x"]
ROWS = [{"prompt": f"{i}?", "answer": str(i)} for i in range(5)]
SIZE = 24


def test_windows_count_every_token_once() -> None:
    assert list(windows([1, 2, 3, 4, 5], 0, 2)) == [([0, 1, 2], 2), ([2, 3, 4], 2), ([3, 4, 5], 1)]
    assert list(windows([1], 0, 8)) == [([0, 1], 1)]
    assert list(windows([], 0, 8)) == []


def test_replicas_of_a_suite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two processes, an engine each: the texts' perplexity and greedy answers are those of transformers."""
    model = make_model(tmp_path / "model", "dense_tied", seed=0).double()
    tokenizer = make_tokenizer(tmp_path / "model")
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"body": text}) for text in TEXTS))
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    suite = {
        "texts": {"data": "texts.jsonl", "perplexity": "{{ body }}", "max_tokens": SIZE},
        "rows": {"data": "rows.jsonl", "max_tokens": 6},
    }
    (tmp_path / "suite.yaml").write_text(json.dumps({"sets": suite}))
    line = ["evaluate", "--model", str(tmp_path / "model"), "--suite", str(tmp_path / "suite.yaml")]
    ranks(2, "-m", "megatron_posttrain", *line, "--output", str(tmp_path / "out"), rollout=True)
    loss, tokens = 0.0, 0
    prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        for window, counted in windows(ids, prefix, SIZE):
            logits = model(torch.tensor([window[:-1]])).logits[0, -counted:]
            loss += float(cross_entropy(logits, torch.tensor(window[-counted:]), reduction="sum"))
        tokens += len(ids)
    found = json.loads((tmp_path / "out" / "texts" / "evaluation.json").read_text())
    assert found["perplexity"] == pytest.approx(math.exp(loss / tokens), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(loss / math.log(2) / sum(len(t.encode()) for t in TEXTS), rel=1e-5)
    assert (found["texts"], found["tokens"]) == (3, tokens)
    records = [json.loads(line) for line in (tmp_path / "out" / "rows" / "responses.jsonl").read_text().splitlines()]
    assert [record["index"] for record in records] == [0, 1, 2, 3, 4]
    for record, row in zip(records, ROWS, strict=True):
        text = f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n"
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        said = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        assert record["response"] == tokenizer.decode(said, skip_special_tokens=True)
    assert main(["evaluate", "--leaderboard", str(tmp_path / "out"), str(tmp_path / "out" / "rows")]) == 0
    head, both, one = capsys.readouterr().out.splitlines()
    assert head.split() == ["run", "rows", "texts", "rows.jsonl"]
    assert f"{found['perplexity']:.3f} (perplexity)" in both
    assert one.split()[1:3] == ["-", "-"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--perplexity", "x.txt", "--samples", "2"], "--samples would be ignored beside --perplexity"),
        (["--perplexity", "x.txt", "--data", "y"], "--data would be ignored beside --perplexity"),
        (["--lm-eval", "gsm8k", "--reward", "math"], "--reward would be ignored beside --lm-eval"),
        (["--leaderboard", "nowhere"], "nowhere: no evaluation.json in it"),
    ],
)
def test_mistakes(line: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = [] if "--leaderboard" in line else ["--model", "m"]
    assert main(["evaluate", *model, *line]) == 2
    assert message in capsys.readouterr().err


def test_keys_that_a_set_of_perplexity_would_ignore(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "suite.yaml").write_text("sets: {a: {data: x.txt, perplexity: '', samples: 2}}")
    assert main(["evaluate", "--model", "m", "--suite", str(tmp_path / "suite.yaml")]) == 2
    assert "samples would be ignored beside perplexity" in capsys.readouterr().err
