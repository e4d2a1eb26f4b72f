"""Weights that change while samples are drawn: each token has the log-prob of those that drew it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.launch import ranks
from tests.helpers.rollout_models import make_model, make_tokenizer


@pytest.mark.parametrize("tensor", [1, 2])
def test_every_token_is_of_the_weights_of_its_time(tmp_path: Path, tensor: int) -> None:
    models = [make_model(tmp_path / str(seed), "moe_untied", seed=seed) for seed in range(3)]
    make_tokenizer(tmp_path / "0")
    ranks(2, "-m", "tests.helpers.in_flight_worker", str(tmp_path), str(tensor), rollout=True)
    found = [json.loads((tmp_path / f"found.{rank}.json").read_text()) for rank in (0, 1)]
    samples = [(x["begins"], *sample) for x in found[::tensor] for sample in x["samples"]]
    assert sorted(sample[1] for sample in samples) == list(range(7))
    assert [len(x["begins"]) for x in found] == [2, 2]
    mixed = 0
    for begins, number, prompt, tokens, logprobs, version in samples:
        assert len(tokens) == len(logprobs) == 40
        parts = [0, *(begin[number] for begin in begins), 40]
        wanted = [
            value
            for model, (start, end) in zip(models, itertools.pairwise(parts), strict=True)
            for value in logprobs_of(model, prompt + tokens)[len(prompt) - 1 :][start:end]
        ]
        assert max(abs(a - b) for a, b in zip(wanted, logprobs, strict=True)) < 1e-4
        drew = [k for k, (start, end) in enumerate(itertools.pairwise(parts)) if end > start]
        assert version == drew[0]
        mixed += len(drew) > 1
    assert mixed >= 3  # those that ran when the first order came


def logprobs_of(model: Any, tokens: list[int]) -> list[float]:
    """Of every token but the first."""
    ids = torch.tensor([tokens])
    with torch.no_grad():
        return model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0].tolist()
