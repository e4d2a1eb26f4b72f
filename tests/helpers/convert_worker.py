"""Run under torchrun by test_convert.py: converts every model with all processes, and loads it in parallel.

convert_worker.py JOBS.json: [{"model", "layout": {...}, "dtype", "save", "out"}]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from megatron_posttrain.checkpoint.convert import ConvertOptions, plan_hf_to_megatron, plan_megatron_to_hf
from megatron_posttrain.checkpoint.stream import StreamOptions
from megatron_posttrain.config.schema import ModelConfig, ParallelConfig, PrecisionConfig
from megatron_posttrain.models.build import build_model
from megatron_posttrain.models.layout_checks import check_layout
from megatron_posttrain.models.sharded import Exporter
from megatron_posttrain.parallel.groups import make_groups, start_distributed
from megatron_posttrain.parallel.layout import Layout
from megatron_posttrain.platform import platform
from megatron_posttrain.upstream.megatron import written_by_threads

SMALL = ConvertOptions(shard_bytes=20_000)  # several files, so that every process has some


def main() -> None:
    from megatron.core import dist_checkpointing, parallel_state

    torch.set_num_threads(1)
    start_distributed()
    for job in json.loads(Path(sys.argv[1]).read_text()):
        source, out = Path(job["model"]), Path(job["out"])
        there = plan_hf_to_megatron(source, SMALL)
        there.run(out / "megatron4", StreamOptions(quiet=True))
        plan_megatron_to_hf(out / "megatron4", SMALL).run(out / "hf4", StreamOptions(quiet=True))

        layout = Layout.from_config(ParallelConfig(**job["layout"]), dist.get_world_size())
        check_layout(layout, there.arch)
        groups = make_groups(layout, 0)
        model = ModelConfig(path=str(source))
        chunks, _ = build_model(there.arch, layout, model, PrecisionConfig(dtype=job["dtype"]))
        with platform().megatron():
            for chunk in chunks:
                wanted = chunk.sharded_state_dict()
                loaded, _, absent = dist_checkpointing.load(wanted, str(out / "megatron4"), strict="return_all")
                assert not absent, sorted(absent)[0]
                chunk.load_state_dict(loaded, strict=False)
        if job["save"]:
            if dist.get_rank() == 0:
                (out / "saved").mkdir()
            dist.barrier()
            with platform().megatron(), written_by_threads():
                dist_checkpointing.save(chunks[0].sharded_state_dict(), str(out / "saved"))
        with platform().megatron():
            tensors = dict(Exporter(chunks, there.arch, groups).hf_tensors())
        if dist.get_rank() == 0:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / "loaded.safetensors")
        parallel_state.destroy_model_parallel()
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
