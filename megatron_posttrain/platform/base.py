"""What the rest of the package may ask of a device."""

import contextlib
from typing import Protocol

import torch


class Platform(Protocol):
    name: str  # "cpu" | "cuda"
    backend: str  # of torch.distributed
    device: torch.device

    def initialize(self, local_rank: int) -> None:
        """Binds the process to its device and sets its threads; before torch.distributed starts."""

    def megatron(self) -> contextlib.AbstractContextManager[None]:
        """Scope in which stock megatron-core works on this device. Re-entrant, fully undone at its end."""

    def fp32_product(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """[n, k] and [k, m] -> [n, m] fp32 that was never rounded to their own dtype; without gradient."""
        return left.float() @ right.float()

    def synchronize(self) -> None:
        """Waits for the device, for timing."""
        return  # a CPU has done it

    def release_memory(self) -> None:
        """Gives cached memory that nothing is in back to the device."""
        return  # a CPU's is not cached

    def peak_memory_bytes(self) -> int:
        """Most memory held since `reset_peak_memory`: device memory on CUDA, resident memory on CPU."""

    def reset_peak_memory(self) -> None:
        return  # Linux keeps one high-water mark a process

    def used_memory_bytes(self) -> int:
        """Held now: of the device by everybody, vLLM and libraries included, on CUDA; resident memory on CPU."""

    def has_transformer_engine(self) -> bool:
        return False

    def has_deepep(self) -> bool:
        return False
