"""Run under torchrun by test_checkpoints.py: trains, saves and resumes under several layouts in one job.

worker.py JOBS.json: [{"model", "layout", "out", "bucket", "load", "stock", "train", "save", "gather", "then"}]
`bucket`: its elements; `load`: a directory; `train`: steps; `save`: into a directory, `gather`: as megatron-core does
it by itself, `stock`: load as it does; `export`: a Hugging Face directory; `then`: steps after that. OUT.RANK.json has
what is to be compared.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.checkpoint import FileSystemReader

from megatron_posttrain.algorithms.losses import cross_entropy
from megatron_posttrain.checkpoint.hf import check_directory
from megatron_posttrain.checkpoint.hf_files import HfWriter
from megatron_posttrain.config.algorithms import SftConfig
from megatron_posttrain.config.schema import CheckpointConfig
from megatron_posttrain.models.layout_checks import check_layout
from megatron_posttrain.models.weights import TensorPlan
from megatron_posttrain.parallel.groups import make_groups, start_distributed
from megatron_posttrain.parallel.layout import Layout
from megatron_posttrain.platform import platform
from megatron_posttrain.training import optimizer
from megatron_posttrain.training.batches import rank_micro_batches
from megatron_posttrain.training.checkpoints import Checkpoints
from megatron_posttrain.training.engine import Engine
from megatron_posttrain.training.export import export
from megatron_posttrain.training.totals import per_token
from megatron_posttrain.upstream.megatron import optimizer_can_resume, written_by_threads
from tests.helpers.layouts.worker import batch

BUCKET = 5_000  # elements, so that even this model has many
METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}


def digest(engine: Engine) -> str:
    """Of this rank's weights, main weights and moments."""
    total = hashlib.sha256()
    tensors = [p.detach() for module in engine.modules for p in module.parameters()]
    for part in engine.optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                state = part.optimizer.state[parameter]
                tensors += [parameter.detach(), state["exp_avg"], state["exp_avg_sq"]]
    for tensor in tensors:
        total.update(tensor.contiguous().view(torch.uint8).numpy())
    return total.hexdigest()


def digest_of_weights(engine: Engine) -> str:
    total = hashlib.sha256()
    for module in engine.modules:
        for parameter in module.parameters():
            total.update(parameter.detach().contiguous().view(torch.uint8).numpy())
    return total.hexdigest()


def train(engine: Engine, first: int, count: int) -> list[float]:
    found = []
    for step in range(first, first + count):
        rows = batch(step, engine.arch.vocab_size, max(4, dist.get_world_size()))
        micro_batches = rank_micro_batches(rows, engine.groups, 1)
        result = engine.train_step(micro_batches, cross_entropy, per_token, 1e-3)
        found += [result.loss, result.grad_norm]
    return found


def stock_state(engine: Engine, loading: bool) -> dict[str, Any]:
    state = {"model": engine.modules[0].sharded_state_dict(metadata=dict(METADATA))}  # type: ignore[operator]
    state["optimizer"] = engine.optimizer.sharded_state_dict(state, is_loading=loading, metadata=dict(METADATA))
    return state


def gather(engine: Engine, directory: Path) -> None:
    """A checkpoint as this package wrote them before: by megatron-core's own gathering, from the first replica."""
    from megatron.core import dist_checkpointing

    path = directory / "checkpoints" / "step_000002"
    if dist.get_rank() == 0:
        path.mkdir(parents=True)
    dist.barrier()
    with platform().megatron(), optimizer_can_resume(), written_by_threads(), written_by_threads():
        dist_checkpointing.save(stock_state(engine, False), str(path), content_metadata=dict(METADATA))
    if dist.get_rank() == 0:
        (path / "trainer_state.json").write_text(json.dumps({"step": 2}))
    dist.barrier()


def load_stock(engine: Engine, directory: Path) -> None:
    from megatron.core import dist_checkpointing

    path = directory / "checkpoints" / "step_000002"
    with platform().megatron(), optimizer_can_resume():
        state = dist_checkpointing.load(stock_state(engine, True), str(path))
        engine.modules[0].load_state_dict(state["model"], strict=False)
        engine.optimizer.load_state_dict(state["optimizer"])


def run(job: dict[str, Any]) -> dict[str, Any]:
    config = SftConfig.model_validate(
        {
            "model": {"path": job["model"]},
            "parallel": job["layout"],
            "precision": {"dtype": job.get("dtype", "bf16")},
            "data": {"train": "none"},
            "output": "none",
        }
    )
    arch = check_directory(config.model.path)[1]
    layout = Layout.from_config(config.parallel, dist.get_world_size())
    check_layout(layout, arch)
    filled: list[int] = []
    fill = TensorPlan.fill

    def counted_fill(plan: TensorPlan, out: torch.Tensor, *rest: Any) -> None:
        filled.append(out.numel())
        fill(plan, out, *rest)

    with patch.object(TensorPlan, "fill", counted_fill):
        engine = Engine.of(config, arch, make_groups(layout, 0))
    facts: dict[str, Any] = {"filled": sum(filled), "loaded": digest_of_weights(engine)}
    first = 0
    if "load" in job:
        read: list[int] = []
        slice_file = FileSystemReader._slice_file

        def counted(self: Any, file: Any, place: Any) -> Any:
            read.append(place.length)
            return slice_file(self, file, place)

        with patch.object(FileSystemReader, "_slice_file", counted):
            first = Checkpoints(Path(job["load"]), CheckpointConfig(every=1)).resume(engine)
        facts["read"] = sum(read)
    if "stock" in job:
        load_stock(engine, Path(job["stock"]))
    train(engine, first, job.get("train", 0))
    facts |= {"first": first, "digest": digest(engine)}
    if "save" in job:
        buffers = [b for part in engine.optimizer.chained_optimizers for b in part.buffers]
        facts["share"] = sum(b.numel // b.data_parallel_group.size() for b in buffers)
        facts["bucket"] = max(x.grad_data.numel() // b.data_parallel_group.size() for b in buffers for x in b.buckets)
        with MemTracker() as tracker:
            Checkpoints(Path(job["save"]), CheckpointConfig(every=1)).save(engine, 2)
            facts["peak"] = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
        facts["peak"] -= sum(b.param_data.nbytes for b in buffers)  # weights were there before
    if "gather" in job:
        gather(engine, Path(job["gather"]))
    if "export" in job:
        opened: list[str] = []
        write = HfWriter._write

        def watched(self: HfWriter, file: Path, *rest: Any) -> None:
            opened.append(str(file))
            write(self, file, *rest)

        with patch.object(HfWriter, "_write", watched):
            export(engine, Path(job["model"]), Path(job["export"]))
        facts["wrote"] = sorted(set(opened))
    facts["then"] = train(engine, 2, job.get("then", 0))
    return facts


def main() -> None:
    from megatron.core import parallel_state

    start_distributed()
    for job in json.loads(Path(sys.argv[1]).read_text()):
        with patch.object(optimizer, "BUCKET_ELEMENTS", job.get("bucket", BUCKET)):
            facts = run(job)
        Path(f"{job['out']}.{dist.get_rank()}.json").write_text(json.dumps(facts))
        parallel_state.destroy_model_parallel()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
