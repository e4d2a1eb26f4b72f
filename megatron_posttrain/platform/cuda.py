"""CUDA: megatron-core's home; nothing is replaced."""

from __future__ import annotations

import contextlib
import importlib.util

import torch

from megatron_posttrain.platform.scope import replaced, without_transformer_engine


class CudaPlatform:
    name = "cuda"
    backend = "nccl"

    def __init__(self) -> None:
        self.device = torch.device("cuda", 0)

    def initialize(self, local_rank: int) -> None:
        self.device = torch.device("cuda", local_rank)
        torch.cuda.set_device(self.device)

    def megatron(self) -> contextlib.AbstractContextManager[None]:
        if self.has_transformer_engine():
            return contextlib.nullcontext()
        return replaced(without_transformer_engine())

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def peak_memory_bytes(self) -> int:
        return torch.cuda.max_memory_allocated()

    def reset_peak_memory(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def has_transformer_engine(self) -> bool:
        return importlib.util.find_spec("transformer_engine") is not None
