"""NF4 with double quantisation against the papers' definition and bitsandbytes; training on it under layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

from megatron_posttrain.models.modules.nf4 import Nf4Weight, Part, nf4_code
from tests.helpers.lora import reference
from tests.helpers.models import EXPERTS, SIZES
from tests.models.test_lora import difference, job, name, run, save

CPU = torch.device("cpu")
NF4 = {"lora": {"rank": 8, "alpha": 16, "quantization": "nf4"}, "steps": 3}
JOBS = {
    1: [job("dense", {}, **NF4), job("moe", {}, **NF4)],
    2: [job("dense", {"tensor": 2}, **NF4), job("moe", {"pipeline": 2}, **NF4), job("moe", {"expert": 2}, **NF4)],
}


def quantised(weight: Tensor) -> Nf4Weight:
    found = Nf4Weight((weight.shape[0], weight.shape[1]), weight.dtype, CPU)
    found.store([lambda: weight], [Part(0, (0, weight.shape[0]), (0, weight.shape[1]))])
    return found


def by_definition(weight: Tensor) -> Tensor:
    """QLoRA (arXiv 2305.14314), equations 3 to 5, by looking at every code, in float64."""
    normal = torch.distributions.Normal(0.0, 1.0)
    ends = torch.tensor([0.9677083], dtype=torch.float64)
    positive = normal.icdf(torch.linspace(float(ends), 0.5, 9, dtype=torch.float64)[:-1])
    negative = -normal.icdf(torch.linspace(float(ends), 0.5, 8, dtype=torch.float64)[:-1])
    code = torch.cat([positive, negative, torch.zeros(1, dtype=torch.float64)]).sort().values
    code = code / code.max()
    torch.testing.assert_close(code.float(), nf4_code(CPU), atol=2e-6, rtol=0)
    code = nf4_code(CPU).double()
    blocks = weight.double().view(-1, 64)
    largest = blocks.abs().amax(1)
    fractions = [10.0 ** (b - 6) * (0.1 + 0.9 * (i + 0.5) / 2**b) for b in range(7) for i in range(2**b)]
    dynamic = torch.tensor(sorted([0.0, 1.0, *fractions, *(-f for f in fractions)]), dtype=torch.float64)
    assert len(dynamic) == 256
    centred = largest - largest.mean()
    scales = []
    for group in centred.split(256):
        top = group.abs().max()
        scales.append(dynamic[((group / top)[:, None] - dynamic).abs().argmin(1)] * top + largest.mean())
    nearest = ((blocks / largest[:, None])[:, :, None] - code).abs().argmin(2)
    return (code[nearest] * torch.cat(scales)[:, None]).view(weight.shape)


@pytest.fixture
def weight() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(192, 256, generator=generator) * torch.rand(192, 1, generator=generator)


def test_values_are_the_papers(weight: Tensor) -> None:
    found = quantised(weight)
    # A scale that lies between two codes, to fp32's rounding, may become either
    assert ((found.dequantised() - by_definition(weight)).abs() > 1e-5).double().mean() < 2e-3
    assert found.nbytes <= 0.30 * 2 * weight.numel()


def test_values_are_those_of_bitsandbytes(weight: Tensor) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    for dtype in (torch.float32, torch.bfloat16):
        codes, state = functional.quantize_4bit(
            weight.to(dtype), blocksize=64, compress_statistics=True, quant_type="nf4"
        )
        theirs = functional.dequantize_4bit(codes, state)
        differ = quantised(weight.to(dtype)).dequantised() != theirs
        assert differ.double().mean() < 2e-3  # its CPU kernel looks scales up in a table of 2^16 ranges


def test_a_shard_has_the_whole_tensors_blocks(weight: Tensor) -> None:
    whole = quantised(weight).dequantised()
    columns = Nf4Weight((192, 128), torch.float32, CPU)
    columns.store([lambda: weight], [Part(0, (0, 192), (128, 256))])
    assert torch.equal(columns.dequantised(), whole[:, 128:])
    rows = Nf4Weight((100, 256), torch.float32, CPU)
    rows.store([lambda: weight, lambda: 2 * weight], [Part(1, (50, 100), (0, 256)), Part(0, (10, 60), (0, 256))])
    assert torch.equal(rows.dequantised()[:50], 2 * whole[50:100])
    assert torch.equal(rows.dequantised()[50:], whole[10:60])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("models")
    sizes = SIZES | {"num_hidden_layers": 2}
    return {
        "dense": save(Qwen3Config(**sizes), directory / "dense"),
        "moe": save(Qwen3MoeConfig(**sizes, **EXPERTS | {"num_experts": 4}), directory / "moe"),
    }


@pytest.fixture(scope="module")
def facts(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(models, JOBS, tmp_path_factory.mktemp("qlora"))


@torch.no_grad()
def dequantised_model(path: str) -> Any:
    """transformers' model, each linear layer and each expert's projection with the values that NF4 leaves of it."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for key, parameter in model.named_parameters():
        if key.endswith("experts.gate_up_proj"):
            for expert in parameter:
                for part in expert.chunk(2):
                    part.copy_(quantised(part.clone()).dequantised())
        elif key.endswith("experts.down_proj"):
            for expert in parameter:
                expert.copy_(quantised(expert.clone()).dequantised())
        elif key.endswith("_proj.weight"):
            parameter.copy_(quantised(parameter.clone()).dequantised())
    return model


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_the_base_is_the_dequantised_model(kind: str, models: dict[str, str], facts: Any) -> None:
    expected = reference.logprobs(dequantised_model(models[kind]))
    for case in (name(n, j) for n, jobs in JOBS.items() for j in jobs if j["model"] == kind):
        assert difference(facts[case]["start"], expected) < 2e-5, case
        assert facts[case]["base"] == facts[case]["start"]


@pytest.mark.parametrize("case", [name(2, j) for j in JOBS[2]])
def test_every_layout_trains_what_one_process_trains(case: str, facts: Any) -> None:
    found, expected = facts[case], facts[f"{case.split('-')[0]}-1"]
    for key in ("losses", "grad_norms"):
        torch.testing.assert_close(torch.tensor(found[key]), torch.tensor(expected[key]), rtol=1e-4, atol=0)
    assert difference(found["trained"], expected["trained"]) < 1e-4


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_the_export_is_what_was_trained(kind: str, facts: Any) -> None:
    found = facts[f"{kind}-1"]
    merged = AutoModelForCausalLM.from_pretrained(found["out"] / "hf", dtype=torch.float32)
    assert difference(found["trained"], reference.logprobs(merged)) < 2e-5
    assert json.loads((Path(found["out"]) / "hf" / "config.json").read_text()).get("quantization_config") is None
