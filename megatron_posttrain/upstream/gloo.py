"""One thread a process for the sockets of all of gloo's groups.

Torch 2.13 gives every group a device of its own, whose thread looks 100 times a second whether there is work: with a
trainer's twenty groups an idle rank takes 2.4% of a core, with one device 0.2%.

Groups that connect every rank with every other when they are made ask one store n x n times: 17 s at 512 ranks and
20 minutes at 4,096. With TORCH_GLOO_LAZY_INIT=1 two ranks connect when they first talk, but several groups on one
device then hang (torch 2.13), so groups have a device each there: on CUDA, whose few gloo groups are vLLM's.
"""

import contextlib
import functools
import os
from datetime import timedelta
from typing import Any

from torch.distributed import ProcessGroupGloo, Store, distributed_c10d

from megatron_posttrain.platform.scope import replaced

LAZY = "TORCH_GLOO_LAZY_INIT"


@functools.cache
def _devices() -> list[Any]:
    """As torch chooses them for a group."""
    if names := os.environ.get("GLOO_SOCKET_IFNAME"):
        return [ProcessGroupGloo.create_device(interface=name) for name in names.split(",")]
    return [ProcessGroupGloo.create_default_device()]


class _Gloo(ProcessGroupGloo):
    def __init__(self, store: Store, rank: int, size: int, timeout: timedelta) -> None:
        options: Any = ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # torch's stubs lack it
        options._devices, options._timeout = _devices(), timeout
        options._threads = 2 * len(_devices())
        super().__init__(store, rank, size, options)


def connect_lazily() -> None:
    """For all groups that this process makes, if the environment does not say otherwise; before the first one."""
    os.environ.setdefault(LAZY, "1")


def shared_device() -> contextlib.AbstractContextManager[None]:
    """Groups that torch makes in this scope share the process' devices, but for those that connect lazily."""
    if os.environ.get(LAZY, "0") == "1":
        return contextlib.nullcontext()
    return replaced([(distributed_c10d, "ProcessGroupGloo", _Gloo)])
