"""Planned memory against real models: parameters, gradients and optimizer exactly, activations within 10%.

The models are built by the training code itself, in one process that stands for any rank of any world: torch's
"fake" process group answers collectives without doing them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from megatron_posttrain.models.architecture import Architecture, MixtureOfExperts, MultiLatentAttention
from megatron_posttrain.models.layout_checks import problems
from megatron_posttrain.parallel.layout import Layout
from megatron_posttrain.planning.activations import Shapes, _layer_tensors, _split, in_flight, stage_activations
from megatron_posttrain.planning.layouts import chunk_layers
from megatron_posttrain.planning.parameters import chunk_parameters, rank_state, trained_elements
from tests.helpers.launch import forked

CONFIGS, SEED = 20, 4
SMALL = Architecture("qwen3", 3, 64, 4, 2, 32, 160, 512, 256, qk_norm=True)
EXPERTS = MixtureOfExperts(8, 2, 96)
MEASURED: dict[str, tuple[Architecture, Layout]] = {
    "dense": (SMALL, Layout()),
    "no norm of queries": (replace(SMALL, qk_norm=False, hidden_size=96), Layout()),
    "a key a query": (replace(SMALL, num_query_groups=4), Layout()),
    "experts": (replace(SMALL, moe=EXPERTS), Layout()),
    "shared": (
        replace(SMALL, qk_norm=False, moe=MixtureOfExperts(8, 4, 64, 128, True, first_dense_layers=1)), Layout()
    ),
    "latent": (
        replace(SMALL, qk_norm=False, num_query_groups=4, mla=MultiLatentAttention(48, 32, 32, 16, 32)), Layout()
    ),
    "sinks and windows": (
        replace(
            SMALL, qk_norm=False, moe=EXPERTS, qkv_bias=True, attention_output_bias=True, mlp_bias=True,
            attention_sinks=True, activation="gpt_oss_glu", sliding_window=32, sliding_layers=(0, 2),
        ),
        Layout(),
    ),
    "tensor parallel": (SMALL, Layout(2, tensor=2)),
    "tensor parallel experts": (replace(SMALL, moe=EXPERTS), Layout(2, tensor=2)),
    "context parallel": (SMALL, Layout(2, context=2)),
}  # fmt: skip
TOKENS = 256


def random_case(rng: random.Random) -> tuple[Architecture, Layout, int, str]:
    """(model, layout, rank, dtype): any family's features, up to 64 ranks."""
    while True:
        layers, heads = rng.choice([4, 8]), rng.choice([4, 8])
        kind = rng.choice(["dense", "experts", "shared", "latent", "gpt-oss"])
        arch = Architecture(
            "random", layers, rng.choice([64, 96, 160]), heads, rng.choice([2, 4]), 32, rng.choice([96, 128, 200]),
            rng.choice([501, 512, 1000]), 128, tied_embeddings=rng.random() < 0.4, qk_norm=rng.random() < 0.5,
            qkv_bias=rng.random() < 0.3,
        )  # fmt: skip
        if kind != "dense":
            moe = MixtureOfExperts(rng.choice([4, 8]), 2, rng.choice([48, 64]), first_dense_layers=rng.choice([0, 1]))
            arch = replace(arch, moe=moe)
        if kind == "shared":
            arch = replace(arch, moe=replace(moe, shared_ffn_size=64, shared_gate=rng.random() < 0.5))
        if kind == "latent":
            mla = MultiLatentAttention(rng.choice([None, 48]), 32, 32, 16, 32)
            arch = replace(arch, mla=mla, num_query_groups=heads, qkv_bias=False, qk_norm=False)
        if kind == "gpt-oss":
            arch = replace(
                arch, qkv_bias=True, attention_output_bias=True, mlp_bias=True, attention_sinks=True,
                activation="gpt_oss_glu", sliding_window=16, sliding_layers=tuple(range(0, layers, 2)),
            )  # fmt: skip
        if rng.random() < 0.25:
            arch = arch.with_scalar_head()
        pipeline = rng.choice([1, 2, 4])
        layout = Layout(
            rng.choice([4, 8, 16, 64]), rng.choice([1, 2, 4]), pipeline,
            rng.choice([None, 2]) if pipeline > 1 else None, rng.choice([1, 2]),
            rng.choice([1, 2, 4]) if arch.moe else 1,
            rng.choice([1, 1, 2]) if arch.moe and kind != "gpt-oss" else 1,  # biases need whole experts
        )  # fmt: skip
        if next(problems(layout, arch), None) is None:
            return arch, layout, rng.randrange(layout.world_size), rng.choice(["bf16", "fp32"])


# ---- in a process of its own: what a real rank holds -------------------------------------------------------


@contextmanager
def fake_rank(layout: Layout, rank: int) -> Iterator[None]:
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_posttrain.parallel.groups import make_groups
    from megatron_posttrain.platform import platform

    with platform().megatron():  # which settles how megatron-core compiles
        from megatron.core import parallel_state as ps

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world_size)
    new_group = dist.new_group
    dist.new_group = lambda *args, **options: new_group(*args, **{**options, "backend": "fake"})
    try:
        make_groups(layout, 0)
        yield
    finally:
        ps.destroy_model_parallel()
        dist.new_group = new_group
        dist.destroy_process_group()


def make_config(dtype: str, recompute: str = "none") -> Any:
    from megatron_posttrain.config.algorithms import SftConfig

    return SftConfig.model_validate(
        {
            "model": {"path": "none", "random_init": True, "recompute": recompute},
            "data": {"train": "none"},
            "output": "none",
            "precision": {"dtype": dtype},
        }
    )


def held_state(arch: Architecture, layout: Layout, rank: int, dtype: str) -> list[int]:
    """[parameters, bytes of weights, of gradients, of optimizer state] of a rank of the real training code."""
    from megatron_posttrain.models.build import build_model
    from megatron_posttrain.platform import platform
    from megatron_posttrain.training.optimizer import make_optimizer, wrap_for_data_parallel

    config = make_config(dtype)
    with fake_rank(layout, rank):
        modules, model_config = build_model(arch, layout, config.model, config.precision)
        with platform().megatron():
            chunks = wrap_for_data_parallel(modules, model_config, overlap=False)
            optimizer = make_optimizer(chunks, model_config, config.optimizer, overlap=False)
        weights = gradients = state = 0
        for chunk in chunks:
            for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
                weights += buffer.param_data.nbytes
                gradients += buffer.grad_data.nbytes
        for part in getattr(optimizer, "chained_optimizers", [optimizer]):
            part.init_state_fn(part.optimizer)
            for group in part.optimizer.param_groups:
                for p in group["params"]:
                    moments = part.optimizer.state[p]
                    state += moments["exp_avg"].nbytes + moments["exp_avg_sq"].nbytes
                    state += p.nbytes if dtype == "bf16" else 0  # in fp32 it is a view of the weights
        return [sum(p.numel() for m in modules for p in m.parameters()), weights, gradients, state]


def saved_bytes(arch: Architecture, layout: Layout, dtype: str, recompute: str) -> int:
    """Storages that autograd keeps in a forward pass of rank 0, weights apart."""
    import torch
    from megatron.core.packed_seq_params import PackedSeqParams

    from megatron_posttrain.models.build import build_model
    from megatron_posttrain.platform import platform

    config = make_config(dtype, recompute)
    with fake_rank(layout, 0):
        (model,), _ = build_model(arch, layout, config.model, config.precision)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept: dict[int, Any] = {}

        def pack(x: Any) -> Any:
            if x.untyped_storage().data_ptr() not in weights:
                kept[x.untyped_storage().data_ptr()] = x  # alive, so that no address comes twice
            return x

        bounds = torch.tensor([0, TOKENS], dtype=torch.int32)
        packed = PackedSeqParams(
            qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=TOKENS, max_seqlen_kv=TOKENS
        )
        tokens = torch.zeros(1, TOKENS // layout.context, dtype=torch.int64)
        with platform().megatron(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model(tokens, tokens, None, packed_seq_params=packed)
        return sum(x.untyped_storage().nbytes() for x in kept.values())


KINDS = [(dtype, recompute) for dtype in ("bf16", "fp32") for recompute in ("none", "selective", "full")]


def measure() -> dict[str, Any]:
    rng = random.Random(SEED)
    return {
        "states": [held_state(*random_case(rng)) for _ in range(CONFIGS)],
        "activations": {name: [saved_bytes(*case, *kind) for kind in KINDS] for name, case in MEASURED.items()},
    }


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    """In a process of its own: megatron-core's state is global, and so is the fake process group."""
    return json.loads(forked(__file__, timeout=280).stdout.splitlines()[-1])


# ---- tests ---------------------------------------------------------------------------------------------


def test_state_of_twenty_random_ranks_is_exact(measured: dict[str, Any]) -> None:
    rng = random.Random(SEED)
    for number, real in enumerate(measured["states"]):
        arch, layout, rank, dtype = random_case(rng)
        state = rank_state(arch, layout, rank, dtype=dtype, overlap=False, transformer_engine=False)
        planned = [state.dense_elements + state.expert_elements, state.weights, state.gradients, state.optimizer]
        assert planned == real, f"case {number}: rank {rank} of {layout}, {arch}"


@pytest.mark.parametrize("model", MEASURED)
def test_activations_within_a_tenth(measured: dict[str, Any], model: str) -> None:
    arch, layout = MEASURED[model]
    for (dtype, recompute), real in zip(KINDS, measured["activations"][model], strict=True):
        bytes_each = 2 if dtype == "bf16" else 4
        shapes = Shapes(TOKENS, TOKENS, bytes_each, recompute=recompute, transformer_engine=False)
        planned = sum(stage_activations(arch, layout, shapes, 0, 1).values())
        if recompute == "full":  # the layer at work is made in the backward pass only
            working = _layer_tensors(arch, arch.num_layers - 1, _split(layout), replace(shapes, recompute="none"))
            planned -= sum(working.values())
        assert planned == pytest.approx(real, rel=0.1), (dtype, recompute)


def test_parameters_add_up_to_transformers_model() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(
        "qwen3_moe", hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        num_experts=8, num_experts_per_tok=2, moe_intermediate_size=96, vocab_size=512, tie_word_embeddings=False,
    )  # fmt: skip
    real = sum(p.numel() for p in transformers.AutoModelForCausalLM.from_config(config).parameters())
    arch = replace(SMALL, num_layers=4, moe=EXPERTS)
    layout = Layout(8, tensor=2, pipeline=2, virtual_pipeline=2, expert=4)
    held = [p for chunk in range(4) for p in chunk_parameters(arch, layout, chunk)]
    replicated = sum(p.elements for p in held if "norm" in p.name or "router" in p.name)
    experts = sum(p.elements for p in held if p.expert)
    assert 4 * experts + replicated + 2 * (sum(p.elements for p in held) - experts - replicated) == real


def test_search_counts_what_ranks_hold() -> None:
    """The quick count of a stage is the exact one but for the padding of buckets."""
    arch = replace(SMALL, num_layers=8, moe=EXPERTS)
    layout = Layout(16, tensor=2, pipeline=2, expert=4)
    quick = sum(trained_elements(arch, layout))
    exact = max(rank_state(arch, layout, rank).weights // 2 for rank in range(16))
    assert exact - 512 <= quick <= exact


@pytest.mark.parametrize(("pipeline", "chunks", "microbatches"), [(4, 1, 8), (4, 1, 2), (2, 3, 4), (4, 2, 8)])
def test_microbatches_in_flight_by_simulation(pipeline: int, chunks: int, microbatches: int) -> None:
    """Replays megatron-core's order of forward and backward passes and counts."""
    total = microbatches * chunks
    for stage in range(pipeline):
        if chunks == 1:
            warmup = min(pipeline - stage - 1, total)
        else:
            warmup = min((pipeline - stage - 1) * 2 + (chunks - 1) * pipeline, total)
        held, peak = 0, 0
        for step in range(total):
            held += 1
            peak = max(peak, held)
            if step >= warmup:
                held -= 1
        assert sum(in_flight(pipeline, chunks, stage, microbatches)) == peak


@pytest.mark.parametrize(("layers", "chunks"), [(126, 64), (94, 32), (61, 16), (48, 24), (5, 4)])
def test_every_layer_is_in_one_chunk(layers: int, chunks: int) -> None:
    found = chunk_layers(Layout(pipeline=chunks), layers)
    assert [n for chunk in found for n in chunk] == list(range(layers))
    sizes = [len(chunk) for chunk in found]
    assert max(sizes) - min(sizes) <= 1
    assert sizes[-1] == min(sizes)


if __name__ == "__main__":
    print(json.dumps(measure()))
