"""The main function of ranks that run the jobs of a file one after the other, each with process groups of its own."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_posttrain.checkpoint.hf import check_directory
from megatron_posttrain.config.schema import Config
from megatron_posttrain.models.layout_checks import check_layout
from megatron_posttrain.parallel.groups import make_groups, start_distributed
from megatron_posttrain.parallel.layout import Layout
from megatron_posttrain.training.engine import Engine


def engine_of(config: Config) -> Engine:
    """Collective: its model, trained, in its layout."""
    arch = check_directory(config.model.path)[1]
    layout = Layout.from_config(config.parallel, dist.get_world_size())
    check_layout(layout, arch)
    return Engine.of(config, arch, make_groups(layout, 0))


def run_jobs(run: Callable[[Any], None]) -> None:
    """`run` for every entry of the JSON list in the file that the command line names."""
    from megatron.core import parallel_state
    from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

    torch.set_num_threads(1)
    start_distributed()
    for job in json.loads(Path(sys.argv[1]).read_text()):
        run(job)
        parallel_state.destroy_model_parallel()
        get_moe_layer_wise_logging_tracker().clear()  # sized by the first model's layers
        dist.barrier()
    dist.destroy_process_group()
