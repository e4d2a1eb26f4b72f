"""A model saved by megatron-core's own `dist_checkpointing.save`, in a process of its own."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.launch import execute


def save_with_megatron_core(source: Path, target: Path) -> None:
    execute([sys.executable, "-m", "tests.layouts.saved", str(source), str(target)], check=True, timeout=120)


def main() -> None:
    from megatron.core import dist_checkpointing

    from megatron_posttrain.checkpoint.hf import HfReader, check_directory
    from megatron_posttrain.config.schema import ModelConfig, ParallelConfig, PrecisionConfig
    from megatron_posttrain.models.build import build_model
    from megatron_posttrain.models.sharded import load_hf
    from megatron_posttrain.parallel.groups import make_groups, start_distributed
    from megatron_posttrain.parallel.layout import Layout
    from megatron_posttrain.platform import platform

    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    start_distributed()
    arch = check_directory(source)[1]
    layout = Layout.from_config(ParallelConfig(), 1)
    groups = make_groups(layout, 0)
    chunks, _ = build_model(arch, layout, ModelConfig(path=str(source)), PrecisionConfig(dtype="bf16"))
    load_hf(chunks, arch, HfReader(source), groups)
    target.mkdir()
    with platform().megatron():
        dist_checkpointing.save(chunks[0].sharded_state_dict(), str(target))


if __name__ == "__main__":
    main()
