"""Stock megatron-core 0.16.1 on CPU with gloo.

megatron-core asks torch.cuda for its device, streams and random states, writes `device="cuda"`, and compares
tensor types with CUDA's. Inside `CpuPlatform.megatron()` such requests are answered with the CPU's own; outside
it torch is untouched, so that vLLM in the same process sees plain torch. No Megatron code is copied.
"""

import contextlib
import functools
import logging
import os
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from megatron_posttrain.platform.base import Platform
from megatron_posttrain.platform.scope import Replacement, replaced, without_transformer_engine

CPU = torch.device("cpu")


class CpuPlatform(Platform):
    name = "cpu"
    backend = "gloo"
    device = CPU

    def __init__(self) -> None:
        self._inside = False
        # Its random state tracker warns whenever the CPU generator moves, which here is the tracked one.
        logging.getLogger("megatron.core.tensor_parallel.random").setLevel(logging.ERROR)

    def initialize(self, local_rank: int) -> None:
        if "OMP_NUM_THREADS" not in os.environ:
            ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))

    @contextlib.contextmanager
    def megatron(self) -> Iterator[None]:
        if self._inside:
            yield
            return
        _import_megatron()
        self._inside = True
        try:
            with replaced(_replacements()), _CudaMeansCpu():
                yield
        finally:
            self._inside = False

    def peak_memory_bytes(self) -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # since the process began

    def used_memory_bytes(self) -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@functools.cache
def _import_megatron() -> None:
    """megatron-core compiles small functions as it is imported. On CPU that would start a C++ compiler at their first
    call; importing torch's compiler for it takes as long as importing megatron-core."""
    with replaced([(torch, "compile", lambda function: function)]):
        import megatron.core.jit
    megatron.core.jit.disable_jit_fuser()  # for the modules that are imported from here on
    if "torch._dynamo" in sys.modules:  # somebody imported one of them before
        torch.compiler.set_stance("force_eager")


def _is_cuda(device: Any) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, torch.device) and device.type == "cuda"


class _CudaMeansCpu(TorchFunctionMode):
    """Redirects requests for CUDA memory; about one microsecond a torch call."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda or func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # distrib_optimizer 361/420/582, clip_grads 167, optimizer 671/690 sort by CUDA type names.
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if kwargs:
            if _is_cuda(kwargs.get("device")):
                kwargs = kwargs | {"device": CPU}
            if kwargs.get("pin_memory"):
                kwargs = kwargs | {"pin_memory": False}
        if func is torch.Tensor.to and any(_is_cuda(a) for a in args[1:]):
            args = tuple(CPU if _is_cuda(a) else a for a in args)
        return func(*args, **kwargs)


class _Stream:
    """A stream, or as _Event an event, of a device on which everything has already happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record_event(self, *args: Any) -> Self:
        return self

    wait_stream = wait_event = wait = record = synchronize = record_event

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        return 0.0


class _Event(_Stream):
    pass


def _answers(value: Any) -> Callable[..., Any]:
    """A function of its own for every name: torch's compiler refuses two names of one."""
    return lambda *args, **kwargs: value


def _splits_to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    # moe_utils 1093 converts only CUDA tensors; the all-to-all needs host numbers here as well.
    return tensor.numpy() if torch.is_tensor(tensor) and as_numpy else tensor


def _all_gather(outputs: list[torch.Tensor], tensor: torch.Tensor, group: Any = None, async_op: bool = False) -> None:
    """gloo gathers equal sizes only; expert tensor parallelism gathers what each rank happens to have."""
    joined, sizes = torch.cat(outputs), [len(o) for o in outputs]
    if len(set(sizes)) == 1:
        dist.all_gather_into_tensor(joined, tensor.contiguous(), group=group)
    else:
        repeated = tensor.repeat(len(outputs), *[1] * (tensor.dim() - 1))
        dist.all_to_all_single(joined, repeated, sizes, [len(tensor)] * len(outputs), group=group)
    for output, part in zip(outputs, joined.split(sizes), strict=True):
        output.copy_(part)


def _reduce_scatter(output: torch.Tensor, inputs: list[torch.Tensor], group: Any = None) -> None:
    """As above, the other way round; the sum is in rank order."""
    parts = output.new_empty(len(inputs), *output.shape)
    arriving, leaving = [len(output)] * len(inputs), [len(part) for part in inputs]
    dist.all_to_all_single(parts.flatten(0, 1), torch.cat(inputs), arriving, leaving, group=group)
    torch.sum(parts, dim=0, out=output)


def _in_place_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
    """The same but for a group of one whose shard is the whole buffer: gloo copies it out and back, 3% of a step."""

    def run(output: torch.Tensor, tensor: torch.Tensor, *, async_op: bool = False, **options: Any) -> Any:
        if options["group"].size() == 1 and output.data_ptr() == tensor.data_ptr() and not async_op:
            return None
        return collective(output, tensor, async_op=async_op, **options)

    return run


def _replacements() -> Iterator[Replacement]:
    import megatron.core.distributed.param_and_grad_buffer as buffers
    import megatron.core.tensor_parallel.random as megatron_random
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    cuda = torch.cuda
    yield cuda, "current_device", lambda: CPU
    yield cuda, "device_count", lambda: 1
    yield cuda, "Stream", _Stream
    yield cuda, "Event", _Event
    yield cuda, "current_stream", _answers(_Stream())
    yield cuda, "default_stream", _answers(_Stream())
    yield cuda, "stream", lambda stream: contextlib.nullcontext()
    for name in ("synchronize", "empty_cache", "set_device", "_lazy_init"):
        yield cuda, name, _answers(None)
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved"):
        yield cuda, name, _answers(0)
    # The CUDA random state tracker then tracks the CPU generator.
    yield cuda, "get_rng_state", lambda *a, **k: torch.get_rng_state()
    yield cuda, "set_rng_state", lambda state, *a, **k: torch.set_rng_state(state)
    yield cuda, "manual_seed", torch.manual_seed
    yield cuda, "initial_seed", torch.initial_seed
    yield dist, "all_gather", _all_gather
    yield dist, "reduce_scatter", _reduce_scatter
    for name in ("dist_all_gather_func", "dist_reduce_scatter_func"):
        yield buffers, name, _in_place_alone(getattr(buffers, name))
    yield megatron_random, "_get_cuda_rng_state", lambda *a, **k: torch.get_rng_state()
    yield megatron_random, "_set_cuda_rng_state", lambda state, *a, **k: torch.set_rng_state(state)
    yield token_dispatcher, "maybe_move_tensor_to_cpu", _splits_to_host
    yield moe_utils, "maybe_move_tensor_to_cpu", _splits_to_host
    yield from without_transformer_engine()
    if not hasattr(moe_utils, "te_general_gemm"):
        # moe_utils 1192/1225 test a name that only exists with Transformer Engine.
        yield moe_utils, "te_general_gemm", None
