"""How fast a rank's device multiplies, beside what training makes of it."""

from __future__ import annotations

import time

import torch

from megatron_posttrain.platform import platform

MATMUL_SIZE = {"cpu": 768, "cuda": 8192}


def matmul_tflops(dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Fastest of repeated square matrix multiplications, TFLOP/s. Local: no other rank is waited for."""
    size, device = MATMUL_SIZE[platform().name], platform().device
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    a @ b
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        platform().synchronize()
        start = time.perf_counter()
        a @ b
        platform().synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e12 if best < float("inf") else 0.0
