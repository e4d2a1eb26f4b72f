"""Trainer to engine, as test_refit.py asserts it: `refit_worker.py DIRECTORY CASES.json REFITS`, under ranks.

A case is {"kind", "layout", "tensor", "expert", "corrupt"}; DIRECTORY/results.RANK.json has its findings.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.scale import engine_boxes
from megatron_posttrain.checkpoint.hf import HfReader, check_directory
from megatron_posttrain.checkpoint.load import load_hf
from megatron_posttrain.config.schema import ModelConfig, ParallelConfig, PrecisionConfig
from megatron_posttrain.models.build import build_model
from megatron_posttrain.models.sharded import Exporter
from megatron_posttrain.parallel.groups import make_groups, start_distributed
from megatron_posttrain.parallel.layout import Layout
from megatron_posttrain.platform import platform
from megatron_posttrain.rollout.engine import RolloutEngine
from megatron_posttrain.rollout.refit import Refit
from tests.helpers.rollout_checks import outcome, prompts, trainer_logprobs

Named = Iterator[tuple[str, Tensor]]


def changed(modules: list[torch.nn.Module], version: int) -> None:
    """New weights, the same function of the old ones on every rank."""
    with torch.no_grad():
        for module in modules:
            for parameter in module.parameters():
                parameter.add_(0.05 * torch.sin(10 * version * parameter))


def skipped(tensors: Named, names: list[str], old: dict[str, Tensor]) -> Named:
    yield from ((name, tensor) for name, tensor in tensors if name != names[0])


def scaled(tensors: Named, names: list[str], old: dict[str, Tensor]) -> Named:
    yield from ((name, tensor * 1.001 if name == names[0] else tensor) for name, tensor in tensors)


def stale(tensors: Named, names: list[str], old: dict[str, Tensor]) -> Named:
    yield from ((name, old[name] if name == names[0] else tensor) for name, tensor in tensors)


def swapped(tensors: Named, names: list[str], old: dict[str, Tensor]) -> Named:
    """A tensor of the first layer and its like in the second, each under the other's name."""
    pair = {names[0]: names[1], names[1]: names[0]}
    yield from ((pair.get(name, name), tensor) for name, tensor in tensors)


CORRUPTIONS = (scaled, stale, swapped, skipped)


def end_update(engine: RolloutEngine) -> None:
    engine._llm.collective_rpc(lambda w: setattr(getattr(w, "worker", w), "_weight_update_active", False))


def check_case(directory: Path, case: dict[str, Any], refits: int) -> dict[str, Any]:
    from megatron.core import parallel_state

    path = directory / case["kind"]
    arch = check_directory(path)[1]
    layout = Layout.from_config(ParallelConfig(**case["layout"]), dist.get_world_size())
    groups = make_groups(layout, 0)
    modules, _ = build_model(arch, layout, ModelConfig(path=str(path)), PrecisionConfig(dtype="fp32"))
    load_hf(modules, arch, HfReader(path), groups)
    exporter = Exporter(modules, arch, groups)
    engine = RolloutEngine(
        str(path), dtype=torch.float32, max_model_len=128, tensor=case["tensor"], expert=case["expert"],
        kv_cache_bytes=32 << 20, load_weights=False,
    )  # fmt: skip
    refit = Refit(engine, exporter)
    worst = 0.0
    for version in range(refits):
        changed(modules, version)
        with platform().megatron():
            whole = {name: tensor.clone() for name, tensor in exporter.hf_tensors()}
        refit.from_trainer(version)
        worst = max(worst, difference(engine, exported(path, whole), version))
    found = {
        "difference": worst,
        "received": refit.shares.received,
        "held": sum(4 * math.prod(b - a for a, b in box) for box in refit.shares.wanted.values()),
        "whole": sum(tensor.nbytes for tensor in whole.values()),
        "names": len(refit.shares.wanted),
        "as planned": refit.shares.schedule.wanted
        == [engine_boxes(arch, position, case["tensor"], case["expert"]) for position in range(case["tensor"])],
        "said": {},
    }
    old = whole
    changed(modules, refits)
    for corruption in CORRUPTIONS[: case["corrupt"]]:
        restored = []
        for kind in ("q_proj", "o_proj", "input_layernorm", "mlp.experts.5.down_proj", "mlp.experts.2.up_proj"):
            names = [f"model.layers.{layer}.{prefix(kind)}{kind}.weight" for layer in range(2)]
            end_update(engine)
            if corruption is skipped:  # vLLM refuses it in the middle of an update, which another one has to end
                restored.append(outcome(lambda: refit.from_trainer(101)))
                end_update(engine)
            stream = corruption(refit.shares.hf_tensors(), names, old)
            found["said"][f"{corruption.__name__} {kind}"] = outcome(lambda s=stream: refit.update(s, 100))
        found |= {"restored": restored[0]} if restored else {}
    if case["corrupt"]:
        found["empty"] = empty_outside(refit)
    engine.close()
    parallel_state.destroy_model_parallel()
    return found


def exported(source: Path, tensors: dict[str, Tensor]) -> Any:
    """The export of these tensors, as transformers loads it."""
    with tempfile.TemporaryDirectory() as directory:
        shutil.copy(source / "config.json", directory)
        save_file(tensors, Path(directory, "model.safetensors"), {"format": "pt"})
        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def prefix(kind: str) -> str:
    return "self_attn." if kind[1:] == "_proj" else ""


def empty_outside(refit: Refit) -> bool:
    """That a tensor is not there but for what the engine takes: experts of other ranks do not come."""
    came = dict(refit.shares.hf_tensors())
    return came.keys() == refit.shares.wanted.keys()


def difference(engine: RolloutEngine, model: Any, seed: int) -> float:
    """Largest of the greedy tokens' log-probs to those of transformers."""
    said, worst = prompts(seed)[:3], 0.0
    for prompt, completion in zip(said, engine.greedy(said, 6), strict=True):
        expected = trainer_logprobs(model)([prompt + completion.token_ids])[0][len(prompt) - 1 :]
        worst = max(worst, float((expected - torch.tensor(completion.logprobs)).abs().max()))
    return worst


def main() -> None:
    directory = Path(sys.argv[1])
    torch.set_num_threads(1)
    start_distributed()
    results = [check_case(directory, case, int(sys.argv[3])) for case in json.loads(sys.argv[2])]
    (directory / f"refit.{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
