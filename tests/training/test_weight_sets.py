"""Weight sets: a reference of the same shape costs host memory and a copy, no second model."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_posttrain.algorithms.losses import cross_entropy
from megatron_posttrain.checkpoint.hf import check_directory
from megatron_posttrain.config.algorithms import SftConfig
from megatron_posttrain.data.batch import Sequence
from megatron_posttrain.parallel.groups import make_groups, start_distributed
from megatron_posttrain.parallel.layout import Layout
from megatron_posttrain.training.batches import rank_micro_batches
from megatron_posttrain.training.engine import Engine
from megatron_posttrain.training.totals import per_token
from tests.helpers.models import make_qwen3


@pytest.fixture(params=["fp32", "bf16"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    from megatron.core import parallel_state

    path = make_qwen3(tmp_path, "moe")
    config = SftConfig.model_validate(
        {"model": {"path": path}, "precision": {"dtype": request.param}, "data": {"train": "-"}, "output": "-"}
    )
    start_distributed()
    yield Engine.of(config, check_directory(path)[1], make_groups(Layout(), 0))
    parallel_state.destroy_model_parallel()


def tensor_bytes() -> int:
    gc.collect()
    storages = {
        x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in gc.get_objects() if type(x) is Tensor
    }
    return sum(storages.values())


def test_a_set_takes_the_models_place_and_leaves_it(engine: Engine) -> None:
    rows = [[Sequence(list(range(20)), [1] * 20)], [Sequence(list(range(30, 44)), [1] * 14)]]
    batches = rank_micro_batches(rows, engine.groups, 1)
    parameters = [p for module in engine.modules for p in module.parameters()]
    size = sum(p.nbytes for p in parameters) + sum(b.nbytes for module in engine.modules for b in module.buffers())
    first = [output["logprobs"].clone() for output in engine.forward(batches)]
    before = tensor_bytes()
    engine.keep_weights("reference")
    assert 0 < tensor_bytes() - before <= size  # the copy, and nothing beside it
    for _ in range(2):
        engine.train_step(batches, cross_entropy, per_token, 1e-2)
    own = [p.detach().clone() for p in parameters]
    trained = [output["logprobs"].clone() for output in engine.forward(batches)]
    assert not torch.equal(trained[0], first[0])
    held = tensor_bytes()
    with engine.weights("reference"):
        assert tensor_bytes() <= held
        again = [output["logprobs"] for output in engine.forward(batches)]
    assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(own, parameters, strict=True))
    with pytest.raises(KeyError), engine.weights("referenze"):
        pass
    # A mean of a micro-batch, which the engine would sum over micro-batches: a gradient that grows with their number.
    with pytest.raises(TypeError, match="term for every token"):
        engine.train_step(batches, lambda output, batch: (output["logprobs"].mean(), {}), per_token, 1e-2)


def test_moments_begin_anew(engine: Engine) -> None:
    """Adam's first step moves a weight by the learning rate, whatever its gradient (arXiv 1412.6980, section 2.1)."""
    rows = [[Sequence(list(range(20)), [1] * 20)], [Sequence(list(range(30, 44)), [1] * 14)]]
    batches = rank_micro_batches(rows, engine.groups, 1)
    mains = []
    for part in engine.optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            group["weight_decay"] = 0.0
            mains += group["params"]
    moved = []
    for reset in (False, False, True):
        if reset:
            engine.reset_optimizer()
        before = [main.detach().clone() for main in mains]
        engine.train_step(batches, cross_entropy, per_token, 1e-3)
        steps = torch.cat([(main.detach() - b).abs().flatten() for main, b in zip(mains, before, strict=True)])
        moved.append(steps[steps > 0] / 1e-3)
    near = [float((steps > 0.99).float().mean()) for steps in moved]
    assert near[0] > 0.95
    assert near[1] < 0.9
    assert near[2] > 0.95
    assert max(float(steps.max()) for steps in (moved[0], moved[2])) < 1.02


def test_a_frozen_model_has_no_gradient_buffers(tmp_path: Path) -> None:
    from megatron.core import parallel_state

    path = make_qwen3(tmp_path, "dense")
    config = SftConfig.model_validate({"model": {"path": path}, "data": {"train": "-"}, "output": "-"})
    start_distributed()
    before = tensor_bytes()
    frozen = Engine.of(config, check_directory(path)[1], make_groups(Layout(), 0), train=False)
    size = sum(p.nbytes for module in frozen.modules for p in module.parameters())
    assert tensor_bytes() - before < 1.1 * size
    parallel_state.destroy_model_parallel()
