"""What stands between Transformer Engine's Python code and a machine without CUDA."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
import torch._inductor.compile_fx  # asks for the real triton, before `install` puts a mock in its place
import torch.distributed as dist

from megatron_posttrain.platform import cpu
from megatron_posttrain.platform.scope import Replacement
from tests.te import SITE, kernels, permutation

HOPPER = (9, 0)


def install() -> None:
    """For the rest of this process; before megatron-core is imported."""
    assert "megatron.core" not in sys.modules
    sys.path.insert(0, str(SITE))
    os.environ |= {"NVTE_PROJECT_BUILDING": "1", "NVTE_TORCH_COMPILE": "0"}  # no CUDA library, no compiler
    sys.modules["transformer_engine_torch"] = kernels
    absent = ("onnx", "onnxscript", "triton", "triton.language", "triton.language.standard")
    for name in absent:
        sys.modules[name] = MagicMock(__version__="3.5.0")
    import transformer_engine.common

    transformer_engine.common.load_framework_extension = lambda framework: None
    sys.modules["transformer_engine.pytorch.triton.permutation"] = permutation
    import transformer_engine.pytorch.cpp_extensions

    for name in absent:
        del sys.modules[name]  # vLLM asks, too

    # Its `from transformer_engine_torch import *` has only the names that are there.
    transformer_engine.pytorch.cpp_extensions.__getattr__ = kernels.__getattr__

    from transformer_engine.pytorch.attention.dot_product_attention import context_parallel

    context_parallel.flash_attn_p2p_communicate = _exchange

    cpu.CpuPlatform.has_transformer_engine = lambda self: True  # type: ignore[method-assign]
    cpu.without_transformer_engine = lambda: iter(())  # type: ignore[assignment]
    torch.cuda.get_device_capability = lambda *a: HOPPER  # type: ignore[assignment]
    stock = cpu._replacements

    def replacements() -> Iterator[Replacement]:
        yield from stock()
        yield torch.cuda, "is_available", lambda: True
        yield (
            torch.cuda,
            "get_device_properties",
            lambda *a: SimpleNamespace(major=HOPPER[0], minor=HOPPER[1], multi_processor_count=132),
        )
        yield torch.version, "cuda", "13.0"
        yield torch.cuda, "is_current_stream_capturing", lambda: False
        yield torch.autograd, "backward", _backward
        yield dist, "_coalescing_manager", _one_by_one
        yield torch.Tensor, "is_cuda", True
        yield torch.Tensor, "cuda", lambda self, *a, **k: self

    cpu._replacements = replacements


@contextlib.contextmanager
def _one_by_one(*args: Any, **kwargs: Any) -> Iterator[Any]:
    """gloo does not coalesce collectives."""
    yield SimpleNamespace(wait=lambda: None)


def _exchange(
    rank: int, send: torch.Tensor, to: int, receive: torch.Tensor, source: int, group: Any, batched: bool
) -> list[Any]:
    """gloo's sends and receives wait for each other where NCCL's are in a stream."""
    ranks = dist.get_process_group_ranks(group)
    everybody = [torch.empty_like(receive) for _ in ranks]
    dist.all_gather(everybody, send.contiguous(), group=group)
    receive.copy_(everybody[ranks.index(source)])
    return []


def _backward(
    tensor: torch.Tensor,
    grad_tensors: torch.Tensor | None = None,
    retain_graph: bool | None = False,
    create_graph: bool = False,
    inputs: Sequence[torch.Tensor] | None = None,
) -> None:
    """torch's own leaves the mode that answers requests for CUDA memory, of which Transformer Engine has some there."""
    gradient = torch.ones_like(tensor) if grad_tensors is None else grad_tensors
    torch.autograd.Variable._execution_engine.run_backward(
        (tensor,), (gradient,), bool(retain_graph), create_graph, tuple(inputs or ()), True, accumulate_grad=True
    )
