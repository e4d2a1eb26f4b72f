"""Ranks that need not import anything: a process imports what trainers import, and forks them. For tests.

Otherwise as torchrun: the same environment, a store in the parent, one rank's failure ends the others. A job is
a line of JSON on stdin, its exit status a line on stdout.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

GRACE = 30  # seconds between SIGTERM and SIGKILL for ranks that are left, as in torchrun


def warm_up() -> None:
    import megatron_posttrain.algorithms.sft
    import megatron_posttrain.checkpoint.convert  # noqa: F401
    from megatron_posttrain.platform import platform

    with platform().megatron():
        import megatron.core.dist_checkpointing.strategies.torch
        import megatron.core.models.gpt  # noqa: F401
    from transformers import AutoTokenizer  # noqa: F401


def serve() -> None:
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os._exit(supervise(json.loads(line)))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def supervise(job: dict[str, Any]) -> int:
    gates, ranks = [], []
    for rank in range(job["processes"]):
        gate = os.pipe()
        child = os.fork()
        if child == 0:
            become_rank(job, rank, gate[0])
        gates.append(gate[1])
        ranks.append(child)
    # After the forks: the store is a thread.
    from torch.distributed import TCPStore

    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    for end in gates:
        os.write(end, str(store.port).encode())
        os.close(end)
    return wait_for(ranks)


def wait_for(ranks: list[int]) -> int:
    """1 when any failed, as torchrun; a rank alone has its own status."""

    def end(number: int, frame: object) -> None:
        for rank in left:
            os.kill(rank, signal.SIGKILL)

    signal.signal(signal.SIGALRM, end)
    left, failed = set(ranks), 0
    while left:
        rank, status = os.wait()
        left.discard(rank)
        if status and not failed:
            failed = os.waitstatus_to_exitcode(status)
            for other in left:
                os.kill(other, signal.SIGTERM)
            signal.alarm(GRACE)
    return 1 if failed and len(ranks) > 1 else failed % 256


def become_rank(job: dict[str, Any], rank: int, gate: int) -> None:
    size = str(job["processes"])
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    port = os.read(gate, 16).decode()
    os.environ.update(place, MASTER_ADDR="localhost", MASTER_PORT=port, TORCHELASTIC_USE_AGENT_STORE="True")
    for name, descriptor in (("stdin", 0), ("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(job[name], os.O_RDWR | os.O_APPEND), descriptor)
    first, *arguments = job["line"]
    try:
        if first == "-m":
            sys.argv = arguments
            runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = [first, *arguments]
            sys.path.insert(0, str(Path(first).resolve().parent))
            runpy.run_path(first, run_name="__main__")
        status: Any = 0
    except SystemExit as error:
        status = error.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else 1)


if __name__ == "__main__":
    warm_up()
    serve()
