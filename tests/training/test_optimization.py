"""Schedules, parameter groups, z-loss, moving averages, steps that are skipped, and checkpoints that are written while
training goes on."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader

from megatron_posttrain.algorithms.losses import cross_entropy
from megatron_posttrain.checkpoint.hf import check_directory
from megatron_posttrain.config.algorithms import SftConfig
from megatron_posttrain.config.schema import OptimizerConfig
from megatron_posttrain.data.batch import Sequence
from megatron_posttrain.parallel.groups import make_groups, start_distributed
from megatron_posttrain.parallel.layout import Layout
from megatron_posttrain.training.batches import rank_micro_batches
from megatron_posttrain.training.engine import Engine
from megatron_posttrain.training.schedule import learning_rate
from megatron_posttrain.training.totals import per_token
from tests.helpers.launch import ranks
from tests.helpers.models import make_qwen3

JOBS: dict[str, dict[str, Any]] = {
    "data": {"layout": {}, "dtype": "fp32", "optimizer": {"router_lr": 1e-4}},
    "experts": {"layout": {"tensor": 2, "expert": 2}, "dtype": "bf16", "optimizer": {"decay": "all"}},
    "stages": {"layout": {"pipeline": 2}, "dtype": "fp32", "optimizer": {"router_lr": 1e-4}},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("optimization")
    model = make_qwen3(out, "moe")
    file = out / "jobs.json"
    file.write_text(json.dumps([job | {"model": model, "out": str(out / name)} for name, job in JOBS.items()]))
    ranks(2, "-m", "tests.helpers.optimization_worker", str(file), timeout=300)
    return out


def facts(runs: Path, name: str) -> dict[str, Any]:
    return torch.load(runs / f"{name}.pt")


@pytest.mark.parametrize("name", JOBS)
def test_steps_that_are_not_finite_are_skipped_and_counted(runs: Path, name: str) -> None:
    found = facts(runs, name)
    assert found["skipped"] == [0, 1, 0, 1, 1]
    assert "the loss is not finite; first seen on rank 1 in the loss" in found["message"]
    kept = found["weights"]
    for before, after in ((0, 1), (2, 3), (3, 4), (4, 5)):
        assert all(torch.equal(kept[before][key], kept[after][key]) for key in kept[0])
    assert not all(torch.equal(kept[0][key], kept[2][key]) for key in kept[0])


@pytest.mark.parametrize("name", ["data", "stages"])
def test_average_is_that_of_a_float64_loop(runs: Path, name: str) -> None:
    found = facts(runs, name)
    for key, average in found["average"].items():
        first, second = (found["weights"][step][key].double() for step in (0, 2))
        expected = 0.75 * first + 0.25 * second
        torch.testing.assert_close(average.double(), expected, rtol=0, atol=1e-7 * float(expected.abs().max() + 1))
        if "norm" not in key:
            assert not torch.equal(average, found["weights"][5][key])


@pytest.mark.parametrize("name", JOBS)
def test_written_while_training_goes_on(runs: Path, name: str) -> None:
    """The same files as otherwise, to the last byte; they count once all are there, and bring all of it back."""
    assert all(all(rank) for rank in facts(runs, name)["same"])
    assert not facts(runs, name)["whole_early"]
    one, other = (runs / name / way / "checkpoints" / "step_000006" for way in ("sync", "async"))
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    assert len([file for file in names if file.endswith(".distcp")]) >= 2
    for file in names:
        if file != ".metadata":
            assert (one / file).read_bytes() == (other / file).read_bytes(), file
    said = [FileSystemReader(str(place)).read_metadata() for place in (one, other)]  # its bytes have the path
    assert said[0].state_dict_metadata == said[1].state_dict_metadata
    assert said[0].storage_data == said[1].storage_data


@pytest.mark.parametrize("name", JOBS)
def test_parameter_groups(runs: Path, name: str) -> None:
    for key, (decay, lr) in facts(runs, name)["groups"].items():
        vector = "layernorm" in key or key.endswith("bias")
        assert decay == (0.0 if vector and name != "experts" else 0.1), key
        assert lr == pytest.approx(1e-4 if "router" in key and name != "experts" else 1e-2), key


@pytest.mark.parametrize(("warmup", "decay", "total"), [(0, None, 20), (4, 5, 20), (18, 5, 20), (0, 30, 20)])
def test_warm_up_stable_decay(warmup: int, decay: int | None, total: int) -> None:
    config = OptimizerConfig(lr=2.0, min_lr=0.5, warmup_steps=warmup, schedule="wsd", decay_steps=decay)
    length = min(total - warmup, decay or total // 10)
    for step in range(total):
        if step < warmup:
            expected = 2.0 * (step + 1) / warmup
        elif step < total - length:
            expected = 2.0
        else:
            expected = 0.5 + 1.5 * (total - step) / length
        assert learning_rate(config, step, total) == pytest.approx(expected, rel=1e-12)


def test_other_schedules_are_as_they_were() -> None:
    for step in range(3, 10):
        done = (step - 3) / 7
        for schedule, share in {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}.items():
            config = OptimizerConfig(lr=2.0, warmup_steps=3, schedule=schedule)  # type: ignore[arg-type]
            assert learning_rate(config, step, 10) == pytest.approx(2 * share, rel=1e-12)


@pytest.fixture
def engines(tmp_path: Path) -> Iterator[list[Engine]]:
    """Without and with z-loss, of weight 0.5."""
    from megatron.core import parallel_state

    path = make_qwen3(tmp_path, "moe")
    start_distributed()
    groups, found = make_groups(Layout(), 0), []
    for weight in (0.0, 0.5):
        config = SftConfig.model_validate(
            {
                "model": {"path": path, "moe": {"z_loss_coefficient": weight}},
                "precision": {"dtype": "fp32"},
                "data": {"train": "-"},
                "optimizer": {"clip_grad": 0},
                "output": str(tmp_path),
            }
        )
        found.append(Engine.of(config, check_directory(path)[1], groups))
    yield found
    parallel_state.destroy_model_parallel()


def test_z_loss_is_that_of_the_formula(engines: list[Engine]) -> None:
    """The last router's gradient: that of weight x mean (log sum exp of its logits)^2 is added (ST-MoE, eq. 5)."""
    gradients, inputs = [], []
    for engine in engines:
        router = engine.modules[0].decoder.layers[-1].mlp.router  # type: ignore[union-attr, index]
        router.register_forward_hook(lambda module, args, out: inputs.append(args[0].detach()))
        before = router.weight.detach().clone()
        batches = rank_micro_batches([[Sequence(list(range(20)), [1] * 20)]], engine.groups, 1)
        engine.train_step(batches, cross_entropy, per_token, 1e-3)
        gradients.append(router.weight.main_grad.double())
    weight: Tensor = before.double().requires_grad_()
    logits = inputs[-1].double().flatten(0, -2) @ weight.T
    (0.5 * logits.logsumexp(-1).square().mean()).backward()
    assert weight.grad is not None
    torch.testing.assert_close(gradients[1] - gradients[0], weight.grad, rtol=1e-4, atol=1e-6)
