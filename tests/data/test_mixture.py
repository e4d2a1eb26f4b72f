"""A run over a mixture with weighted turns: its loss against transformers' sums, and resumed to the last bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_posttrain.data.cache import Encoder, tokenized
from megatron_posttrain.data.dataset import TokenizedDataset
from tests.helpers.launch import ranks
from tests.helpers.models import make_assets
from tests.training.test_resume import metrics

WEIGHTS = [3.0, 1.0]


@pytest.mark.timeout(900)
def test_mixture_of_weighted_turns(tmp_path: Path) -> None:
    assets = make_assets(tmp_path)
    lines = (assets / "train.jsonl").read_text().splitlines()
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for file, part in zip(files, (lines[:40], lines[40:120]), strict=True):
        rows = [json.loads(line) for line in part]
        for i, row in enumerate(rows):
            row["messages"][-1]["weight"] = (1, 0.25, 2.5)[i % 3]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    mixture = ",".join(f"{{path: {file}, weight: {weight}}}" for file, weight in zip(files, WEIGHTS, strict=True))
    line = [
        "-m", "megatron_posttrain", "sft", f"model.path={assets / 'model'}", f"data.train=[{mixture}]",
        "precision.dtype=fp32", "data.sequence_length=64", "training.global_batch_size=4",
        "training.micro_batch_size=2", "optimizer.lr=1e-3", "optimizer.schedule=constant", "checkpoint.every=6",
        "logging.tensorboard=false",
    ]  # fmt: skip
    # 12 steps of 4 rows are more than an epoch of this mixture.
    ranks(2, *line, "training.steps=12", f"output={tmp_path / 'whole'}")
    for steps in (6, 12):
        done = ranks(2, *line, f"training.steps={steps}", f"output={tmp_path / 'halves'}")
    assert metrics(tmp_path / "halves") == metrics(tmp_path / "whole")
    assert f"an epoch takes 90 (of 40) from {files[0]}, 30 (of 80) from {files[1]}" in done.stdout

    tokenizer = AutoTokenizer.from_pretrained(assets / "model")
    encoder = Encoder(tokenizer, {}, "refuse", "all-assistant")
    sources = [tokenized(str(file), encoder, tmp_path / ".cache") for file in files]  # what the run has left
    data = TokenizedDataset(sources, 64, weights=WEIGHTS)
    model = AutoModelForCausalLM.from_pretrained(assets / "model", dtype=torch.float64, experts_implementation="eager")
    total = weight = 0.0
    for conversation in (c for row in data.batch(0, 4) for c in row):
        ids, mask = torch.tensor(conversation.token_ids), torch.tensor(conversation.loss_mask, dtype=torch.float64)
        with torch.no_grad():
            logprobs = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        total -= float((mask[1:] * logprobs).sum())
        weight += float(mask[1:].sum())
    first = metrics(tmp_path / "whole")[0]
    assert first["loss"] == pytest.approx(total / weight, rel=1e-5)
    assert first["loss_tokens"] == weight
