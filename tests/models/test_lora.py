"""Adapters under every layout: what PEFT trains, one process trains, and every layout trains, saves and merges."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoModelForCausalLM, PreTrainedConfig, Qwen3Config, Qwen3MoeConfig

from megatron_posttrain.checkpoint.convert import ConvertOptions, plan_merge
from megatron_posttrain.checkpoint.hf import check_directory, table_reader
from megatron_posttrain.checkpoint.hf_files import HfReader, HfWriter
from megatron_posttrain.checkpoint.stream import StreamOptions
from megatron_posttrain.models import registry
from tests.helpers.family_configs import tiny_configs
from tests.helpers.launch import ranks
from tests.helpers.lora import reference
from tests.helpers.models import EXPERTS, SIZES, make_assets
from tests.te import needs_transformer_engine

STEPS = 4
LORA = {"rank": 8, "alpha": 16}
DENSE = [{"tensor": 2}, {"tensor": 2, "sequence": False}, {"pipeline": 2}, {"context": 2}, {}]
Job = dict[str, Any]


def job(kind: str, layout: dict[str, Any], **options: Any) -> Job:
    return {"model": kind, "layout": layout, "lora": LORA, "steps": STEPS} | options


DORA = {"lora": LORA | {"use_dora": True}}
NAMED = {"lora": LORA | {"targets": ["q_proj", "gate", "lm_head"]}}
RECOMPUTED = {"model_options": {"recompute": "full"}}
OPTIONS = [("dense", DORA), ("moe", NAMED)]
# By processes; the first of a kind and a world of one is what the others are compared with
JOBS: dict[int, list[Job]] = {
    1: [
        *(job(kind, {}, steps=steps) for kind in ("dense", "moe", "fused") for steps in (0, STEPS)),
        job("moe", {}, grouped=True),
        job("dense", {}, **RECOMPUTED),
        *(job(kind, {}, steps=steps, **more) for kind, more in OPTIONS for steps in (0, STEPS)),
    ],
    2: [
        *(job("dense", layout) for layout in DENSE),
        *(job("moe", layout) for layout in ({"tensor": 2}, {"pipeline": 2}, {"expert": 2}, {"context": 2}, {})),
        job("moe", {"tensor": 2, "expert_tensor": 2}),
        job("fused", {"tensor": 2, "expert_tensor": 2, "sequence": True}),
        job("dense", {"tensor": 2}, **RECOMPUTED),
        *(job(kind, {"tensor": 2}, **more) for kind, more in OPTIONS),
    ],
    4: [
        job("dense", {"tensor": 2, "pipeline": 2}),
        job("moe", {"tensor": 2, "expert": 2, "expert_tensor": 2}),
        job("moe", {"tensor": 2, "pipeline": 2, "expert": 2}),
        job("fused", {"tensor": 2, "expert": 2}),
    ],
}


MODEL_OF = {"dora": "dense", "named": "moe"}


def name(processes: int, job: Job) -> str:
    extra = [key for key in ("grouped", "model_options", "transformer_engine") if job.get(key)]
    parts = [f"{key}{size}" for key, size in job["layout"].items()]
    options = (kind for kind, key in (("dora", "use_dora"), ("named", "targets")) if key in job["lora"])
    kind = next(options, job["model"])
    return "-".join([kind, str(processes), *parts, *extra, *(["start"] if not job["steps"] else [])])


def fuse(source: str, directory: Path) -> str:
    """The same model with its experts in 3-D tensors."""
    config, arch = check_directory(source)
    reader = HfReader(source)
    read, layout = table_reader(reader, arch), registry.layout(arch, fused=True)
    contents = {name: (torch.float32, shape) for name, shape in layout.shapes.items()}
    with HfWriter(directory, contents, config) as writer:
        for stored, tensor in layout.assemble((part, read(part)) for part in registry.layout(arch).places):
            writer.write(stored, tensor)
    return str(directory)


def save(config: PreTrainedConfig, directory: Path) -> str:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data.normal_(1 if parameter.dim() == 1 else 0, 0.2)
    model.save_pretrained(directory)
    return str(directory)


def run(models: dict[str, str], jobs: dict[int, list[Job]], out: Path) -> dict[str, Any]:
    """Facts by name; a job a world size, because starting processes costs more than the work."""
    for processes, wanted in jobs.items():
        file = out / f"jobs{processes}.json"
        placed = [j | {"model": models[j["model"]], "out": str(out / name(processes, j))} for j in wanted]
        file.write_text(json.dumps(placed))
        ranks(
            processes, "-m", "tests.helpers.lora.worker", str(file), te=any("transformer_engine" in j for j in wanted)
        )
    names = [name(processes, j) for processes, wanted in jobs.items() for j in wanted]
    return {n: json.loads((out / n / "facts.json").read_text()) | {"out": out / n} for n in names}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("models")
    sizes = SIZES | {"num_hidden_layers": 2}
    made = {
        "dense": save(Qwen3Config(**sizes), directory / "dense"),
        "moe": save(Qwen3MoeConfig(**sizes, **EXPERTS | {"num_experts": 4}), directory / "moe"),
    }
    return made | {"fused": fuse(made["moe"], directory / "fused")}


@pytest.fixture(scope="module")
def facts(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(models, JOBS, tmp_path_factory.mktemp("lora"))


def difference(found: list[list[float]], expected: list[list[float]] | list[Tensor]) -> float:
    pairs = zip(found, expected, strict=True)
    return max((torch.as_tensor(a) - torch.as_tensor(b)).abs().max().item() for a, b in pairs)


def adapter(fact: Any) -> dict[str, Tensor]:
    return load_file(fact["out"] / "adapter" / "adapter_model.safetensors")


WITH_PEFT = ["dense", "fused", "dora", "named"]


def check_with_peft(kind: str, models: dict[str, str], facts: Any, steps: int) -> None:
    base, start = models[MODEL_OF.get(kind, kind)], facts[f"{kind}-1-start"]["out"] / "adapter"
    for key, expected in zip(("losses", "grad_norms"), reference.train(base, start, steps), strict=True):
        torch.testing.assert_close(torch.tensor(facts[f"{kind}-1"][key]), torch.tensor(expected), rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", WITH_PEFT)
def test_trains_what_peft_trains(kind: str, models: dict[str, str], facts: Any) -> None:
    check_with_peft(kind, models, facts, STEPS)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_ten_steps(models: dict[str, str], tmp_path: Path) -> None:
    """What PEFT trains, and every layout."""
    jobs = {n: [job | {"steps": 10 if job["steps"] else 0} for job in of_size] for n, of_size in JOBS.items()}
    facts = run(models, jobs, tmp_path)
    for kind in WITH_PEFT:
        check_with_peft(kind, models, facts, 10)
    for case in (case for case in CASES if "start" not in case):
        check_layout(case, facts)


CASES = [name(n, j) for n, jobs in JOBS.items() for j in jobs if n > 1 or len(name(n, j).split("-")) > 2]


@pytest.mark.parametrize("case", [case for case in CASES if "start" not in case])
def test_every_layout_trains_what_one_process_trains(case: str, facts: Any) -> None:
    check_layout(case, facts)


def check_layout(case: str, facts: Any) -> None:
    found, expected = facts[case], facts[f"{case.split('-')[0]}-1"]
    for key in ("losses", "grad_norms"):
        torch.testing.assert_close(torch.tensor(found[key]), torch.tensor(expected[key]), rtol=1e-4, atol=0)
    assert difference(found["trained"], expected["trained"]) < 1e-4
    mine, theirs = adapter(found), adapter(expected)
    assert mine.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(mine[key], value, rtol=1e-3, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("kind", ["dense", "moe", "fused", "dora", "named"])
def test_files_hold_the_trained_model(kind: str, models: dict[str, str], facts: Any, tmp_path: Path) -> None:
    found, base = facts[f"{kind}-1"], models[MODEL_OF.get(kind, kind)]
    merged = AutoModelForCausalLM.from_pretrained(found["out"] / "hf", dtype=torch.float32)
    assert difference(found["trained"], reference.logprobs(merged)) < 2e-5
    assert difference(found["trained"], reference.logprobs(reference.load(base, found["out"] / "adapter"))) < 2e-5
    if kind in MODEL_OF:  # of the others elsewhere
        options = ConvertOptions(adapter=found["out"] / "adapter")
        plan_merge(Path(base), options).run(tmp_path / "merged", StreamOptions(quiet=True))
        ours = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
        assert difference(found["trained"], reference.logprobs(ours)) < 2e-5


@pytest.mark.parametrize("case", [name(n, j) for n, jobs in JOBS.items() for j in jobs])
def test_base_is_frozen(case: str, facts: Any) -> None:
    found = facts[case]
    assert found["base_unchanged"]
    assert found["base"] == found["start"]  # B is zero before the first step
    # No gradient of the base: buffers hold the adapters' parameters and their alignment
    assert found["trained_elements"] <= found["gradient_elements"] < 2 * found["trained_elements"] + 4096
    assert found["trained"] != found["start"] or "start" in case


# ---- families: latent attention, fused and transposed experts with biases, shared experts, both implementations

FAMILIES = {
    "deepseek-v3": [{"tensor": 2}],
    "gpt-oss": [{"tensor": 2, "expert": 2}],
    "qwen2-moe": [{"tensor": 2, "expert_tensor": 2}],
    "llama-biases": [{"pipeline": 2}],
}
TE = {"transformer_engine": True, "model_options": {"implementation": "transformer_engine"}}
FAMILY_JOBS = {
    1: [job(kind, {}, steps=3) for kind in FAMILIES],
    2: [job(kind, layout, steps=3) for kind, layouts in FAMILIES.items() for layout in layouts],
}


@pytest.fixture(scope="module")
def family_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("families")
    return {kind: save(tiny_configs()[kind], directory / kind) for kind in FAMILIES}


@pytest.fixture(scope="module")
def family_facts(family_models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(family_models, FAMILY_JOBS, tmp_path_factory.mktemp("family_facts"))


@pytest.mark.parametrize("kind", FAMILIES)
def test_families_train_alike_and_are_merged(kind: str, family_models: Any, family_facts: Any, tmp_path: Path) -> None:
    expected = family_facts[name(1, job(kind, {}))]
    for layout in FAMILIES[kind]:
        found = family_facts[name(2, job(kind, layout))]
        for key in ("losses", "grad_norms"):
            torch.testing.assert_close(torch.tensor(found[key]), torch.tensor(expected[key]), rtol=1e-4, atol=0)
        assert difference(found["trained"], expected["trained"]) < 1e-4
    loaded = reference.load(family_models[kind], expected["out"] / "adapter")
    dropped = kind in ("deepseek-v3", "qwen2-moe")  # PEFT takes dense and shared MLPs for experts: `names_in_both`
    assert (difference(expected["trained"], reference.logprobs(loaded)) < 5e-5) != dropped
    options = ConvertOptions(adapter=expected["out"] / "adapter")
    plan_merge(Path(family_models[kind]), options).run(tmp_path / "merged", StreamOptions(quiet=True))
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert difference(expected["trained"], reference.logprobs(ours)) < 5e-5
    merged = AutoModelForCausalLM.from_pretrained(expected["out"] / "hf", dtype=torch.float32)
    assert difference(expected["trained"], reference.logprobs(merged)) < 5e-5


@needs_transformer_engine
def test_transformer_engines_layers_train_the_same(models: Any, facts: Any, tmp_path: Path) -> None:
    """Its Python code with torch's kernels: merged norms, grouped experts, whole down-projections."""
    wanted = {2: [job("dense", {"tensor": 2}, **TE), job("moe", {"tensor": 2}, **TE), job("moe", {"expert": 2}, **TE)]}
    for case, found in run(models, wanted, tmp_path).items():
        expected = facts[f"{case.split('-')[0]}-1"]
        torch.testing.assert_close(torch.tensor(found["losses"]), torch.tensor(expected["losses"]), rtol=1e-4, atol=0)
        torch.testing.assert_close(
            torch.tensor(found["grad_norms"]), torch.tensor(expected["grad_norms"]), rtol=1e-4, atol=0
        )


def test_a_run_goes_on_from_its_adapters(tmp_path: Path) -> None:
    """With dropout, to the last bit; and under another layout."""
    assets = make_assets(tmp_path)

    def sft(output: Path, layout: str) -> None:
        line = [
            "sft", f"model.path={assets / 'model'}", f"data.train={assets / 'train.jsonl'}", f"output={output}",
            "precision.dtype=fp32", "data.sequence_length=64", "training.global_batch_size=4",
            "training.micro_batch_size=2", "training.steps=2", "optimizer.lr=1e-2", "checkpoint.every=1",
            "checkpoint.keep=9", "logging.tensorboard=false", "lora={rank: 4, dropout: 0.1}", *layout.split(),
        ]  # fmt: skip
        ranks(2, "-m", "megatron_posttrain", *line)

    def losses(output: Path) -> list[float]:
        return [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]

    whole, again, other = tmp_path / "whole", tmp_path / "again", tmp_path / "other"
    sft(whole, "parallel.tensor=2 parallel.expert=2")
    for copy in (again, other):
        shutil.copytree(whole / "checkpoints" / "step_000001", copy / "checkpoints" / "step_000001")
    sft(again, "parallel.tensor=2 parallel.expert=2")
    assert losses(again) == losses(whole)[1:]
    files = [run / "adapter" / "adapter_model.safetensors" for run in (whole, again)]
    assert files[0].read_bytes() == files[1].read_bytes()
    stored = FileSystemReader(str(whole / "checkpoints" / "step_000002")).read_metadata().state_dict_metadata
    assert all(".lora." in key for key in stored if "decoder" in key or "embedding" in key)
    sft(other, "parallel.pipeline=2")
    # Masks of dropout differ between layouts; the adapters that step 2 begins with do not
    assert abs(losses(other)[0] / losses(whole)[1] - 1) < 0.05
