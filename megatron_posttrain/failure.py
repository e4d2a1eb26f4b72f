"""Why a process ends; in a job of several, why the first of them failed: the others only lose their peers."""

import ctypes
import json
import os
import signal
import sys
import textwrap
import threading
import time
from typing import Any

from megatron_posttrain.errors import UserError

FIRST_SECONDS = 2.0  # that a rank which failed later outlives the first, for the launcher to meet that one
STORE_SECONDS = 10.0  # the store's own machine may be what is gone
PR_SET_PDEATHSIG = 1
job_store: Any = None  # of a job of several default groups, which have a part of it each


def end_with_launcher() -> None:
    """A worker of torchrun or launch/node.py is killed by the kernel as soon as its launcher is gone.

    Orphans would hold the GPUs and go on writing to the output that the next job resumes. The kernel's signal
    reaches a process that hangs as well, which a thread that watches its parent need not; SIGKILL, since a stop that
    saves would need the launcher's store. Started by hand or by srun a process may outlive the shell: not there.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()


def die_with_parent() -> None:
    """The kernel ends this process as soon as the one that started it is gone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def report(error: Exception) -> int:
    """Prints why this process ends, last of all why the first rank of its job did; the exit status."""
    status = error.status if isinstance(error, UserError) else 1
    kind = "error" if isinstance(error, UserError) else type(error).__name__
    mine: dict[str, Any] = {"rank": int(os.environ.get("RANK", "0")), "reason": f"{kind}: {error}", "status": status}
    distributed = sys.modules.get("torch.distributed")
    met = distributed is not None and distributed.is_initialized()
    ranks = int(os.environ.get("WORLD_SIZE", "1"))  # announced by a launcher
    if distributed is not None and met and job_store is None:  # the world is the job
        ranks = distributed.get_world_size()
    if ranks == 1:
        _show(error, mine["reason"])
        return status
    if not met:
        # Every rank finds the same mistake: one of a node says so, and the launcher then ends the others.
        if isinstance(error, UserError) and os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(FIRST_SECONDS)
        _tell_launcher(error)
        _show(error, mine["reason"])
        return status
    first = _first(mine)
    if first == mine:
        _tell_launcher(error)
        _show(error, f"rank {mine['rank']}: {mine['reason']}")
        return status
    if first["reason"] == mine["reason"]:
        print(f"rank {mine['rank']}: {mine['reason']}", file=sys.stderr, flush=True)
    else:
        own = textwrap.shorten(mine["reason"].splitlines()[0], 120, placeholder="...")
        why = f"rank {mine['rank']} ends ({own}), since rank {first['rank']} failed first: {first['reason']}"
        print(why, file=sys.stderr, flush=True)
    time.sleep(FIRST_SECONDS)
    return first["status"]


def _show(error: Exception, reason: str) -> None:
    if isinstance(error, UserError):
        print(reason, file=sys.stderr, flush=True)
    else:
        sys.excepthook(type(error), error, error.__traceback__)
        sys.stderr.flush()


def _first(mine: dict[str, Any]) -> dict[str, Any]:
    """What the first rank to fail left in the job's store, which is `mine` when there is none before it."""
    found = [mine]

    def ask() -> None:
        from torch.distributed.distributed_c10d import _get_default_store

        try:
            store = job_store or _get_default_store()
            found.append(json.loads(store.compare_set("megatron_posttrain/failure", "", json.dumps(mine))))
        except (RuntimeError, ValueError) as error:  # its machine is gone: this rank's own reason is all there is
            print(f"rank {mine['rank']}: the job's store does not answer: {error}", file=sys.stderr, flush=True)

    asker = threading.Thread(target=ask, daemon=True)
    asker.start()
    asker.join(STORE_SECONDS)
    return found[-1]


def _tell_launcher(error: Exception) -> None:
    """Into the file that torchrun reads: its last lines then show this reason, and this rank as the cause."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    get_error_handler().record_exception(error)
