"""The `score` command against transformers on the same directory and conversations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers.launch import ranks
from tests.helpers.models import make_assets


@pytest.mark.timeout(300)
def test_score_equals_transformers(tmp_path: Path) -> None:
    assets = make_assets(tmp_path)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join((assets / "train.jsonl").read_text().splitlines()[:25]) + "\n")
    out = tmp_path / "out"
    ranks(
        2, "-m", "megatron_posttrain", "score", f"model.path={assets / 'model'}", f"data.train={rows}",
        f"output={out}", "precision.dtype=fp32", "parallel.tensor=2", "parallel.expert=2", "data.sequence_length=256",
    )  # fmt: skip
    scored = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(assets / "model")
    model = AutoModelForCausalLM.from_pretrained(assets / "model", dtype=torch.float32)
    assert [s["index"] for s in scored] == list(range(25))
    for score, line in zip(scored, rows.read_text().splitlines(), strict=True):
        ids = tokenizer.apply_chat_template(json.loads(line)["messages"], return_dict=True)["input_ids"]
        assert score["token_ids"] == ids
        t = torch.tensor(ids)
        with torch.no_grad():
            expected = model(t[None]).logits[0, :-1].log_softmax(-1).gather(1, t[1:, None])[:, 0]
        assert (torch.tensor(score["logprobs"]) - expected).abs().max() < 1e-4
