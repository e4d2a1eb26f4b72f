"""Run as ranks by test_preferences.py: whole training commands one after the other in one job.

preference_worker.py JOBS.json: [[command, {config}], ...]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_posttrain.config.algorithms import ALGORITHMS
from megatron_posttrain.parallel.groups import start_distributed


def main() -> None:
    from megatron.core import parallel_state
    from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

    torch.set_num_threads(1)
    start_distributed()
    for command, config in json.loads(Path(sys.argv[1]).read_text()):
        row = ALGORITHMS[command]
        assert row.load()(row.config.model_validate(config)) == 0
        parallel_state.destroy_model_parallel()
        get_moe_layer_wise_logging_tracker().clear()  # sized by the first model's layers
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
