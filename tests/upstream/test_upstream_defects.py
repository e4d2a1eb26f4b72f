"""Workarounds of defects of megatron-core 0.16.1 and torch 2.13, switched off: these fail when one is not needed."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from megatron_posttrain.algorithms.losses import cross_entropy
from megatron_posttrain.checkpoint.hf import check_directory
from megatron_posttrain.config.algorithms import SftConfig
from megatron_posttrain.config.schema import CheckpointConfig
from megatron_posttrain.data.batch import Sequence
from megatron_posttrain.parallel.groups import make_groups, start_distributed
from megatron_posttrain.parallel.layout import Layout
from megatron_posttrain.platform import cpu, platform, scope
from megatron_posttrain.training.batches import rank_micro_batches
from megatron_posttrain.training.checkpoints import Checkpoints, _sharded_state
from megatron_posttrain.training.engine import Engine
from megatron_posttrain.training.totals import per_token
from megatron_posttrain.upstream import gloo
from megatron_posttrain.upstream import megatron as fixes
from tests.helpers.family_checks import tiny_model
from tests.helpers.family_configs import tiny_configs
from tests.helpers.launch import ranks
from tests.helpers.layouts import reference
from tests.helpers.models import make_qwen3


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    from megatron.core import parallel_state

    path = make_qwen3(tmp_path, "moe")
    config = SftConfig.model_validate(
        {"model": {"path": path}, "precision": {"dtype": "fp32"}, "data": {"train": "-"}, "output": str(tmp_path)}
    )
    start_distributed()
    yield Engine.of(config, check_directory(path)[1], make_groups(Layout(), 0))
    parallel_state.destroy_model_parallel()


def train(engine: Engine) -> None:
    batches = rank_micro_batches([[Sequence(list(range(20)), [1] * 20)]], engine.groups, 1)
    engine.train_step(batches, cross_entropy, per_token, 1e-3)


def without(monkeypatch: pytest.MonkeyPatch, fix: str) -> None:
    monkeypatch.setattr(fixes, "_FIXES", {k: v for k, v in fixes._FIXES.items() if k != fix})


def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path, CheckpointConfig(every=1))


def steps(engine: Engine) -> list[torch.Tensor]:
    return [s["step"] for o in engine.optimizer.chained_optimizers for s in o.optimizer.state.values()]


@pytest.mark.parametrize(
    ("fix", "error"),
    [
        ("sharded_state_dict", AssertionError),
        ("_set_main_param_and_optimizer_states", (KeyError, RuntimeError)),
    ],
)
def test_loading_the_optimizer_fails_without(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fix: str, error: Any
) -> None:
    train(engine)
    checkpoints(tmp_path).save(engine, 1)
    if fix == "sharded_state_dict":
        for optimizer in engine.optimizer.chained_optimizers:
            optimizer.optimizer.state.clear()  # as in a process that has just started
    without(monkeypatch, fix)
    with pytest.raises(error):
        checkpoints(tmp_path).resume(engine)


@pytest.mark.parametrize("threads", [True, False])
def test_saving_starts_processes_without_threads(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: bool
) -> None:
    train(engine)
    before = set(psutil.Process().children(recursive=True))
    if not threads:
        monkeypatch.setattr("megatron_posttrain.training.checkpoints.written_by_threads", nullcontext)
    checkpoints(tmp_path).save(engine, 1)
    started = set(psutil.Process().children(recursive=True)) - before
    for process in started:
        process.kill()
    assert bool(started) != threads


def test_all_states_share_a_step_without_its_fix(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(engine)
    checkpoints(tmp_path).save(engine, 1)
    checkpoints(tmp_path).resume(engine)
    fixed = steps(engine)
    assert len({s.data_ptr() for s in fixed}) == len(fixed)
    without(monkeypatch, "load_state_dict")
    checkpoints(tmp_path).resume(engine)
    assert len({s.data_ptr() for s in steps(engine)}) < len(fixed)


def test_a_stage_without_experts_has_no_step_without_its_fixes(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    train(engine)
    experts = engine.optimizer.chained_optimizers[1]
    experts.optimizer.state.clear()
    experts.buffers, experts.gbuf_ranges = [], []
    for group in experts.optimizer.param_groups:
        group["params"] = []

    def saved_steps() -> set[float]:
        with platform().megatron(), fixes.optimizer_can_resume():
            state = _sharded_state(engine, loading=False)[0]["optimizer"]
        return {group["step"] for part in state.values() for group in part["optimizer"]["param_groups"]}

    assert saved_steps() == {1}
    monkeypatch.setattr(fixes, "_CHAINED_FIXES", {})
    assert saved_steps() == {0, 1}
    without(monkeypatch, "state_dict")
    with pytest.raises(AssertionError):
        saved_steps()


def test_experts_are_marked_as_such_only_by_us(tmp_path: Path, engine: Engine) -> None:
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear

    with platform().megatron():
        stock = ColumnParallelLinear(
            8, 8, config=engine.model_config, init_method=torch.nn.init.zeros_, bias=False, is_expert=True
        )
    assert stock.weight.allreduce, "megatron-core marks experts itself: upstream/megatron.py need not"
    names = {n: p.allreduce for n, p in engine.modules[0].named_parameters() if ".experts." in n}
    assert names
    assert not any(names.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="of the CPU platform")
@pytest.mark.parametrize("name", ["te_general_gemm", "current_device"])
def test_training_on_cpu_fails_without_stand_in(engine: Engine, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    kept = [r for r in cpu._replacements() if r[1] != name]
    assert len(kept) < len(list(cpu._replacements()))
    monkeypatch.setattr(cpu, "_replacements", lambda: iter(kept))
    with pytest.raises((AssertionError, RuntimeError, NameError, AttributeError, TypeError, ValueError)):
        train(engine)


@pytest.fixture(scope="module")
def unmended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, Any], float]]:
    """By workaround: what a step without it gave under tensor=2, and the gradient norm that transformers finds."""
    root = tmp_path_factory.mktemp("unmended")
    cases = {
        "mark_experts": "gpt-oss",
        "keep_correction_biases": "deepseek-v3",
        "split_down_projections": "deepseek-v3",
    }
    jobs = []
    for name, kind in cases.items():
        if not (root / kind).exists():
            tiny_model(tiny_configs()[kind], torch.float32).save_pretrained(root / kind)
        jobs.append(
            {"model": f"{root / kind}", "layout": {"tensor": 2}, "steps": 1, "without": name, "out": f"{root / name}"}
        )
    (root / "jobs.json").write_text(json.dumps(jobs))
    ranks(2, "-m", "tests.helpers.layouts.worker", str(root / "jobs.json"))
    norms = {kind: reference.train(str(root / kind), 1)[1][0] for kind in cases.values()}
    return {name: (json.loads((root / name / "facts.json").read_text()), norms[kind]) for name, kind in cases.items()}


@pytest.mark.parametrize("name", ["mark_experts", "split_down_projections"])
def test_gradients_are_wrong_without(unmended: dict[str, Any], name: str) -> None:
    facts, expected = unmended[name]
    assert facts["grad_norms"][0] != pytest.approx(expected, rel=1e-4)


def test_padded_rows_fail_without_correction_biases_kept(unmended: dict[str, Any]) -> None:
    assert "must match the size" in unmended["keep_correction_biases"][0]["failed"]


@pytest.mark.skipif(platform().has_transformer_engine(), reason="Transformer Engine is installed")
def test_latent_attention_believes_in_transformer_engine() -> None:
    import megatron.core.transformer.multi_latent_attention as mla

    assert [r[1] for r in scope.without_transformer_engine()] == ["HAVE_TE"]
    assert mla.HAVE_TE, "megatron-core reports it rightly: platform/scope.py need not"


def threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


@pytest.mark.parametrize("shared", [True, False])
def test_gloo_without_one_device_for_all_groups_has_a_thread_for_each(shared: bool) -> None:
    start_distributed()
    gc.collect()  # groups of other tests end theirs now
    before = threads()
    with gloo.shared_device() if shared else nullcontext():
        groups = [dist.new_group([0], backend="gloo") for _ in range(3)]
    added = threads() - before
    for group in groups:
        dist.destroy_process_group(group)
    assert added == 3 * (2 if shared else 3)  # two of a group run its collectives
