"""`score` on a real model, against transformers: run with SMOLLM2 set to what examples/smollm2_from_gguf.py wrote."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers.launch import torchrun

MODEL = os.environ.get("SMOLLM2", "")
TEXTS = [
    ("What is the capital of France?", "The capital of France is Paris."),
    ("Add 17 and 25.", "17 + 25 = 42, so the answer is 42."),
    ("Name three primary colours.", "Red, yellow and blue. " * 12),
]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(not MODEL, reason="SMOLLM2 names no Hugging Face directory of SmolLM2-135M-Instruct")
@pytest.mark.parametrize(("processes", "layout"), [(3, "tensor"), (2, "pipeline"), (2, "context")])
def test_logprobs_are_those_of_transformers(tmp_path: Path, processes: int, layout: str) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": asked, "response": said}) + "\n" for asked, said in TEXTS))
    torchrun(
        processes, "-m", "megatron_posttrain", "score", f"model.path={MODEL}", f"data.train={rows}",
        f"output={tmp_path}", "precision.dtype=fp32", f"parallel.{layout}={processes}",
    )  # fmt: skip
    scored = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    for score, (asked, said) in zip(scored, TEXTS, strict=True):
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        ids = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
        assert score["token_ids"] == ids
        t = torch.tensor(ids)
        with torch.no_grad():
            # In fp64: torch's own fp32 log-softmax of 49,152 columns is off by 1.5e-5 in the mean, ours is not.
            logprobs = model(t[None]).logits[0, :-1].double().log_softmax(-1)
        expected = logprobs.gather(1, t[1:, None])[:, 0]
        assert (torch.tensor(score["logprobs"], dtype=torch.float64) - expected).abs().max() < 3e-5
