"""Heads under parallel layouts against transformers: a scalar of the last token, and the likeliest tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from megatron_posttrain.config.schema import PrecisionConfig
from megatron_posttrain.models.head import Fp32Product
from tests.helpers.heads_worker import Z_LOSS, K, sequences
from tests.helpers.launch import ranks
from tests.helpers.models import SIZES, make_qwen3

LAYOUTS: list[dict[str, int]] = [{"tensor": 2}, {"pipeline": 2}, {"context": 2}, {"expert": 2}, {}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_qwen3(tmp_path_factory.mktemp("heads"), "moe")


def norm(model: torch.nn.Module) -> float:
    return float(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm())


def reference(path: str) -> dict[str, Any]:
    """The same of transformers, whose classifier has our new head's weights."""
    hidden = SIZES["hidden_size"]
    language = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    classifier = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32, num_labels=1)
    drawn = torch.randn(1, hidden, generator=torch.Generator().manual_seed(0)) / (hidden + 1) ** 0.5
    classifier.score.weight.data.copy_(drawn)
    classifier.config.pad_token_id = 0
    top, values, terms, squares = [], [], [], []
    for sequence in sequences(SIZES["vocab_size"]):
        ids = torch.tensor(sequence.token_ids)[None].long()
        logits = language(ids).logits[0, :-1]
        found = logits.detach().log_softmax(-1).topk(K)
        terms.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none"))
        squares.append(Z_LOSS * logits.logsumexp(-1).square())
        top.append((found.values, found.indices))
        # Its own choice of the last token looks for padding, which a random token may be.
        values.append(classifier.score(classifier.model(ids).last_hidden_state[0, -1])[0])
    loss = torch.stack([(value - 1) ** 2 for value in values]).mean()
    loss.backward()
    z_loss = torch.cat(squares).mean()
    whole = torch.cat(terms).mean() + z_loss
    whole.backward()
    return {
        "top": top,
        "values": [float(v) for v in values],
        "loss": float(loss),
        "grad_norm": norm(classifier),
        "z_loss": [float(whole), norm(language), float(z_loss)],
    }


@pytest.mark.parametrize("processes", [1, 2])
def test_heads(model: str, tmp_path: Path, processes: int) -> None:
    layouts = LAYOUTS if processes > 1 else [{}]
    job = {"model": model, "layouts": layouts, "out": str(tmp_path / "facts.json")}
    (tmp_path / "job.json").write_text(json.dumps(job))
    ranks(processes, "-m", "tests.helpers.heads_worker", str(tmp_path / "job.json"))
    expected = reference(model)
    for layout, facts in zip(layouts, json.loads((tmp_path / "facts.json").read_text()), strict=True):
        assert facts["requires_grad"] == 0, layout  # frozen: no gradient buffer could be made
        assert facts["values"] == pytest.approx(expected["values"], abs=1e-5), layout
        assert facts["value"] == pytest.approx(sum(expected["values"]) / len(expected["values"]), abs=1e-5), layout
        assert facts["loss"] == pytest.approx(expected["loss"], rel=1e-5), layout
        assert facts["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4), layout
        assert facts["z_loss"] == pytest.approx(expected["z_loss"], rel=1e-4), layout
        for (logprobs, tokens), right in zip(facts["top"], expected["top"], strict=True):
            torch.testing.assert_close(torch.tensor(logprobs), right[0], rtol=0, atol=1e-5)
            assert (torch.tensor(tokens).long() == right[1]).float().mean() > 0.99  # equal values may trade places


def test_fp32_logits_are_not_rounded() -> None:
    """Of bf16 values, against float64; gradients against those of the same loss of rounded inputs."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 256, generator=generator).bfloat16().requires_grad_() for n in (5, 40))
    logits = Fp32Product.apply(hidden[:, None], weight)
    exact = (hidden[:, None].double() @ weight.double().t()).detach()
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), exact, rtol=0, atol=1e-4)
    assert (exact.bfloat16().double() - exact).abs().max() > 0.05  # what rounding would do
    logits.sum().backward()
    for found, right in (
        (hidden, weight.double().sum(0).expand(5, -1)),
        (weight, hidden.double().sum(0).expand(40, -1)),
    ):
        torch.testing.assert_close(found.grad.double(), right, rtol=0.01, atol=0.05)


def test_caches_know_what_they_were_computed_in() -> None:
    """As before `head` was a key, unless it is used: a run of then goes on."""
    assert PrecisionConfig(dtype="fp32").fingerprint() == '{"dtype":"fp32","fp8":null,"bf16_ends":0}'
    assert "head" in PrecisionConfig(head="fp32").fingerprint()
