"""Processes that need not import anything: one imports what trainers import, and forks them. For tests.

Ranks are otherwise torchrun's: the same environment, a store in the parent, one rank's failure ends the others. A
process alone has nothing of that. A job is a line of JSON on stdin, its exit status a line on stdout.

    python -m tests.helpers.warm [te]    # te: with Transformer Engine's layers on CPU
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

STARTED_WITH = dict(os.environ)
GRACE = 30  # seconds between SIGTERM and SIGKILL for ranks that are left, as in torchrun


def warm_up() -> None:
    if "te" in sys.argv:
        from tests.te.install import install

        install()
    import megatron_posttrain.algorithms.sft
    import megatron_posttrain.checkpoint.convert  # noqa: F401
    from megatron_posttrain.platform import platform

    with platform().megatron():
        import megatron.core.dist_checkpointing.strategies.torch
        import megatron.core.models.gpt  # noqa: F401
    from transformers import AutoTokenizer  # noqa: F401


def warm_up_vllm() -> None:
    """And what an engine imports when it is made."""
    import megatron_posttrain.rollout  # noqa: F401 - before vLLM: it sets what that reads from the environment

    # isort: split
    from vllm import LLM  # noqa: F401
    from vllm.model_executor.models import qwen3, qwen3_moe  # noqa: F401
    from vllm.v1.worker import cpu_worker  # noqa: F401


def serve() -> None:
    for line in sys.stdin:
        job = json.loads(line)
        if job["rollout"]:
            with contextlib.redirect_stdout(sys.stderr):  # ours is for statuses
                warm_up_vllm()
        gc.freeze()  # megatron-core and vLLM collect garbage often; of what was imported it would take 0.4 s each time
        job["environment"] |= {name: x for name, x in os.environ.items() if STARTED_WITH.get(name) != x}  # by imports
        child = os.fork()
        if child == 0:
            os._exit(supervise(job))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def supervise(job: dict[str, Any]) -> int:
    os.environ.clear()
    os.environ.update(job["environment"])
    if not job["processes"]:
        become(job)
    gates, ranks = [], []
    for rank in range(job["processes"]):
        gate = os.pipe()
        child = os.fork()
        if child == 0:
            size, port = str(job["processes"]), os.read(gate[0], 16).decode()
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
            os.environ.update(place, MASTER_ADDR="localhost", MASTER_PORT=port, TORCHELASTIC_USE_AGENT_STORE="True")
            become(job)
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


def become(job: dict[str, Any]) -> NoReturn:
    """The program that the job names."""
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
