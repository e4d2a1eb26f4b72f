"""A loss or gradient that is not finite is never trained on, under any layout: weights keep every bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.launch import command, ranks
from tests.helpers.models import make_assets, make_qwen3

DTYPES = ("fp32", "bf16")
FAULTS = ("loss", "activation", "gradient", "weight")
LAYOUTS: dict[int, list[dict[str, int]]] = {1: [{}], 4: [{}, {"tensor": 2, "pipeline": 2}, {"context": 2}]}
# Of the rank that is spoilt, under every layout: the second layer of the last stage's model of four layers.
LAST = {1: {"": 1}, 4: {"": 1, "tensor2pipeline2": 3, "context2": 1}}


def name(layout: dict[str, int]) -> str:
    return "".join(f"{k}{v}" for k, v in layout.items())


CASES = [
    (processes, layout, dtype, fault)
    for processes, layouts in LAYOUTS.items()
    for layout in layouts
    for dtype in DTYPES
    for fault in FAULTS
]


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("not_finite")
    model = make_qwen3(out, "dense")
    for processes in LAYOUTS:
        jobs = [
            {"model": model, "layout": layout, "dtype": dtype, "faults": FAULTS, "rank": processes - 1}
            | {"out": str(out / f"{processes}-{name(layout)}-{dtype}")}
            for layout in LAYOUTS[processes]
            for dtype in DTYPES
        ]
        file = out / f"jobs{processes}.json"
        file.write_text(json.dumps(jobs))
        ranks(processes, "-m", "tests.helpers.not_finite_worker", str(file))
    return {file.stem: json.loads(file.read_text()) for file in out.glob("*-*.json")}


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("processes", "layout", "dtype", "fault"), CASES)
def test_step_is_refused(facts: dict[str, Any], processes: int, layout: dict[str, int], dtype: str, fault: str) -> None:
    said = facts[f"{processes}-{name(layout)}-{dtype}-{fault}"]
    messages = {message for message, _ in said}
    assert len(messages) == 1, messages
    message = messages.pop()
    assert all(same for _, same in said)
    layer = LAST[processes][name(layout)]
    # A tensor rank's output is summed over its group before the next rank sees it.
    spoilt = {
        f"on rank {rank} " for rank in ({processes - 2, processes - 1} if "tensor" in layout else {processes - 1})
    }
    assert any(rank in message for rank in spoilt), message
    assert {
        "loss": "the loss is not finite; first seen",
        "activation": f"in the output of decoder.layers.{layer}.mlp.linear_fc2, micro-batch 0",
        "gradient": "the gradient norm is",
        "weight": f"the weight decoder.layers.{layer}.mlp.linear_fc2.weight",
    }[fault] in message, message
    if fault == "loss":
        assert "in the loss, micro-batch 0" in message
    if fault == "gradient":
        assert f"the gradient of decoder.layers.{layer}.mlp.linear_fc1.weight" in message


def test_run_ends_with_what_it_has(tmp_path: Path) -> None:
    """Status 1, one message, metrics in JSON; the checkpoint before the bad step stays, nothing is exported."""
    assets = make_assets(tmp_path)
    run, arguments = tmp_path / "run", ["data.sequence_length=64", "training.global_batch_size=2"]
    arguments += ["precision.dtype=fp32", "logging.tensorboard=false", "checkpoint.every=1", "optimizer.lr=1e36"]
    arguments += ["optimizer.warmup_steps=0", "training.steps=8", f"model.path={assets / 'model'}"]
    done = command("sft", *arguments, f"data.train={assets / 'train.jsonl'}", f"output={run}", check=False)
    assert done.returncode == 1, done.stderr
    assert "Traceback (most" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: step 2: ")
    lines = [json.loads(line, parse_constant=pytest.fail) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_000001"]
    assert not (run / "hf").exists()


@pytest.mark.parametrize("task", ["score", "sft"])
def test_weight_of_the_source_is_named(tmp_path: Path, task: str) -> None:
    assets = make_assets(tmp_path)
    file = assets / "model" / "model.safetensors"
    tensors = load_file(file)
    down = next(key for key in sorted(tensors) if key.endswith("down_proj.weight"))
    tensors[down].view(-1)[0] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    arguments = [f"model.path={assets / 'model'}", f"data.train={assets / 'train.jsonl'}", "precision.dtype=fp32"]
    arguments += ["training.steps=1"] if task == "sft" else []
    done = command(task, *arguments, f"output={tmp_path / 'run'}", "data.sequence_length=64", check=False)
    assert done.returncode == 1, done.stderr
    assert "not finite" in done.stderr
    assert "first seen on rank 0 in the weight decoder.layers." in done.stderr
    assert not (tmp_path / "run" / "scores.jsonl").exists()
