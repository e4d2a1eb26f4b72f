"""Defects of vLLM 0.32.0 on CPU, and of its sleep mode on CUDA (`map_when_freed`), and the ways round them.

Each of CPU has a test in tests/rollout (test_rollout.py, test_vllm_fixes.py) that fails when vLLM no longer needs it.
vLLM itself is not edited; the patches (`private_shared_memory`, `unbound_memory`) last only while an engine starts.
"""

import contextlib
import functools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_posttrain.platform.scope import replaced

SHARED_MEMORY = Path("/dev/shm")

# gpu_model_runner._bookkeeping_sync rewinds a request's generator after a partial prefill with
# `Generator.set_offset`, which CPU generators lack: a seeded request whose prompt is cut kills the engine.
CPU_OPTIONS: dict[str, Any] = {"enable_chunked_prefill": False}


def forget_packed_experts(model: torch.nn.Module) -> None:
    """Before a weight update. UnquantizedFusedMoEMethod._setup_kernel packs the experts for the CPU kernel
    only when there is no kernel yet; on a later load the plain layout is read as if packed, silently wrong.
    """
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if method is not None and getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


def tied_heads(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Output layers whose weight is the embedding's; empty during a weight update, so ask before it."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    modules = list(model.modules())
    embeddings = {id(m.weight) for m in modules if type(m) is VocabParallelEmbedding}
    return [m for m in modules if isinstance(m, ParallelLMHead) and id(m.weight) in embeddings]


def repack_tied_heads(heads: Iterable[Any]) -> None:
    """After a weight update. A tied output layer multiplies with its own oneDNN copy of the embedding; no
    tensor of the update is named after it, so the layerwise reload never makes a new copy.
    """
    for head in heads:
        head.quant_method.process_weights_after_loading(head)


@contextlib.contextmanager
def private_shared_memory(token: str) -> Iterator[None]:
    """While an engine starts: `token`, the same on every rank and new for every engine, goes into the names
    of its shared memory.

    _CPUSHMDistributed.make_group_name builds them from the ranks alone under an external launcher, so two
    jobs on a node, or a job after a crashed one, fail with "File exists". The names are removed once every
    rank has mapped the memory, so that a killed job leaves nothing behind.
    """
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    original = _CPUSHMDistributed.make_group_name
    prefix = f"megatron-posttrain-{token}-"
    renamed = staticmethod(lambda communicator: prefix + original(communicator).replace("/", ""))
    try:
        with replaced([(_CPUSHMDistributed, "make_group_name", renamed)]):
            yield
    finally:
        for path in SHARED_MEMORY.glob(f"{prefix}*"):
            path.unlink(missing_ok=True)


class _MappedWhenFreed(dict[int, Any]):
    def pop(self, pointer: int, *default: Any) -> Any:
        data = super().pop(pointer, *default)
        if data.is_asleep:
            from vllm.device_allocator.cumem import create_and_map

            with contextlib.suppress(RuntimeError):  # no memory left: the allocator then says what it says today
                create_and_map(data.handle)
                data.is_asleep = False
        return data


def map_when_freed(allocator: Any) -> None:
    """Before an engine that sleeps on CUDA is closed. CuMemAllocator's C++ unmaps what is freed, also what sleep has
    unmapped: "CUDA Error: invalid argument at cumem_allocator.cpp", once an allocation. Each is mapped again for that
    moment, which takes one allocation's memory and not the whole engine's.
    """
    allocator.pointer_to_data = _MappedWhenFreed(allocator.pointer_to_data)


def counted_nodes(on_node: int, first: int = 0) -> contextlib.AbstractContextManager[None]:
    """While an engine starts: nodes are counted from the ranks, `on_node` of which are on each, and number `first` of
    which is rank 0 of the engines. vLLM asks every rank in turn who shares its memory, with three collectives over all
    ranks a node: minutes with hundreds of nodes."""
    from vllm.distributed import parallel_state

    def count(group: Any) -> int:
        return len({(first + rank) // on_node for rank in dist.get_process_group_ranks(group)})

    return replaced([(parallel_state, "_node_count", count)])


def map_experts() -> None:
    """For engines with expert parallelism, from their start on: CPUUnquantizedExperts.apply is handed the map from the
    model's experts to this rank's and looks no further: another rank's experts are read past the end of this one's."""
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    original = CPUUnquantizedExperts.apply
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def apply(self: Any, *, topk_ids: Any, topk_weights: Any, expert_map: Any, **others: Any) -> Any:
        if expert_map is not None:
            here = expert_map[topk_ids.long()].to(topk_ids.dtype)
            topk_ids, topk_weights = here.clamp(min=0), topk_weights * (here >= 0)
        return original(self, topk_ids=topk_ids, topk_weights=topk_weights, expert_map=None, **others)

    CPUUnquantizedExperts.apply = apply


@contextlib.contextmanager
def unbound_memory() -> Iterator[None]:
    """While an engine starts: CPUWorker.__init__ binds all memory of the process, the trainer's included, to
    the NUMA node of the first allowed core, which is the same one for every rank of a node.
    """
    namespace: Any = torch.ops._C
    namespace.init_cpu_memory_env = lambda nodes: None
    try:
        yield
    finally:
        del namespace.init_cpu_memory_env
