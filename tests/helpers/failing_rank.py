"""A job whose rank 1 fails while the others wait for it. For tests.

torchrun -m tests.helpers.failing_rank user | crash | hang
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_posttrain.cli.main import process
from megatron_posttrain.errors import UserError
from megatron_posttrain.failure import report
from megatron_posttrain.parallel.groups import start_distributed


def work() -> int:
    start_distributed()
    dist.barrier()
    if sys.argv[1] == "hang":
        Path(sys.argv[2], str(os.getpid())).touch()
        time.sleep(300)
    if dist.get_rank() == 1:
        if sys.argv[1] == "user":
            raise UserError("row 7 of the file is bad")
        raise KeyError("unexpected unit")
    dist.all_reduce(torch.ones(1))
    return 0


def main() -> int:
    try:
        return work()
    except UserError as error:  # as in cli.main
        return report(error)


if __name__ == "__main__":
    raise SystemExit(process(main))
