"""CUDA: megatron-core's home; nothing is replaced."""

import contextlib
import importlib.util

import torch

from megatron_posttrain.platform.base import Platform
from megatron_posttrain.platform.scope import replaced, without_transformer_engine


class CudaPlatform(Platform):
    name = "cuda"
    backend = "nccl"

    def __init__(self) -> None:
        self.device = torch.device("cuda", 0)

    def initialize(self, local_rank: int) -> None:
        self.device = torch.device("cuda", local_rank)
        torch.cuda.set_device(self.device)
        # cuDNN 9.20's backward pass with a mask gives NaN for lengths of 64 modulo 128 where a row's log-sum-exp is
        # below -88.7 (torch 2.12 and 2.13, Hopper; pytorch issue 196678). Transformer Engine's own use of it stays.
        torch.backends.cuda.enable_cudnn_sdp(False)

    def megatron(self) -> contextlib.AbstractContextManager[None]:
        if self.has_transformer_engine():
            return contextlib.nullcontext()
        return replaced(without_transformer_engine())

    def fp32_product(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        if left.dtype == torch.float32:
            return left @ right
        return torch.mm(left, right, out_dtype=torch.float32)  # no fp32 copy of a vocabulary's weights, as in vLLM

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def release_memory(self) -> None:
        torch.cuda.empty_cache()

    def peak_memory_bytes(self) -> int:
        return torch.cuda.max_memory_allocated()

    def reset_peak_memory(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def used_memory_bytes(self) -> int:
        free, total = torch.cuda.mem_get_info()
        return total - free

    def has_transformer_engine(self) -> bool:
        # The second is its extension for torch, which the package alone does not bring.
        return all(importlib.util.find_spec(name) for name in ("transformer_engine", "transformer_engine_torch"))

    def has_deepep(self) -> bool:
        return importlib.util.find_spec("deep_ep") is not None


def fp8_recipes(capability: tuple[int, int]) -> tuple[str, ...]:
    """Transformer Engine's FP8 recipes that a GPU of this compute capability runs."""
    if capability >= (10, 0):
        return ("delayed", "tensorwise", "mxfp8")
    if capability >= (9, 0):
        return ("delayed", "tensorwise", "blockwise")
    return ("delayed", "tensorwise") if capability >= (8, 9) else ()
