"""The output layer runs on the tokens that count, and only there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

from megatron_posttrain.algorithms.losses import cross_entropy
from megatron_posttrain.checkpoint.hf import check_directory
from megatron_posttrain.config.algorithms import SftConfig
from megatron_posttrain.data.batch import Sequence
from megatron_posttrain.parallel.groups import make_groups, start_distributed
from megatron_posttrain.parallel.layout import Layout
from megatron_posttrain.training.batches import rank_micro_batches
from megatron_posttrain.training.engine import Engine
from megatron_posttrain.training.heads import LabelLogprobs
from megatron_posttrain.training.totals import per_token
from tests.helpers.models import make_qwen3


def test_rows_temperature_and_a_row_without_loss(tmp_path: Path) -> None:
    from megatron.core import parallel_state

    path = make_qwen3(tmp_path, "dense")
    config = SftConfig.model_validate(
        {"model": {"path": path}, "precision": {"dtype": "fp32"}, "data": {"train": "-"}, "output": str(tmp_path)}
    )
    start_distributed()
    groups = make_groups(Layout(), 0)
    engine = Engine.of(config, check_directory(path)[1], groups, train=False)
    seen: list[int] = []
    layer = engine.modules[0].get_submodule("output_layer")
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output[0].shape[0]))
    ids = list(range(20))
    rows = [[Sequence(ids, [0] * 15 + [1] * 5)], [Sequence(ids, [0] * 20)]]
    counted, none = engine.forward(rank_micro_batches(rows, groups, 1), LabelLogprobs(0.7))
    parallel_state.destroy_model_parallel()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        expected = (model(torch.tensor([ids])).logits[0] / 0.7).log_softmax(-1)
    right = expected[14:19].gather(1, torch.tensor(ids[15:])[:, None])[:, 0]
    torch.testing.assert_close(counted["logprobs"][14:19], right, rtol=0, atol=1e-4)
    assert not counted["logprobs"][:14].any()
    assert seen == [5, 1]  # of 20 each; a micro-batch that counts nothing still has one
    assert none["logprobs"].count_nonzero() <= 1


def products(work: Callable[[], object]) -> set[str]:
    with profile(activities=[ProfilerActivity.CPU]) as found:
        work()
    return {event.key for event in found.key_averages() if event.key in ("aten::mm", "aten::bmm")}


def test_gradient_of_a_frozen_layer_is_one_product(tmp_path: Path) -> None:
    """Under an adapter. A product a token reads the layer's whole weight for each of them."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.layers import LinearWithFrozenWeight

    start_distributed()
    path = make_qwen3(tmp_path, "dense")
    config = SftConfig.model_validate(
        {
            "model": {"path": path},
            "lora": {"rank": 2},
            "precision": {"dtype": "fp32"},
            "data": {"train": "-"},
            "output": str(tmp_path),
        }
    )
    groups = make_groups(Layout(), 0)
    engine = Engine.of(config, check_directory(path)[1], groups)
    batches = rank_micro_batches([[Sequence(list(range(20)), [1] * 20)]], groups, 1)
    assert products(lambda: engine.train_step(batches, cross_entropy, per_token, 1e-3)) == {"aten::mm"}
    parallel_state.destroy_model_parallel()

    def stock() -> None:  # tokens and batch change places behind the layer, as in megatron-core's models
        hidden, weight = torch.randn(20, 1, 8, requires_grad=True), torch.randn(16, 8)
        logits = LinearWithFrozenWeight.apply(hidden, weight, None, False, None)
        logits.transpose(0, 1).contiguous().backward(torch.ones(1, 20, 16))

    assert "aten::bmm" in products(stock), "`as_matrix` of models/head.py is not needed any more"
