"""Everything that differs between CUDA and CPU. `platform()` is the one of this process."""

import functools

import torch

from megatron_posttrain.platform.base import Platform


@functools.cache
def platform() -> Platform:
    """CUDA where a GPU is visible, else CPU."""
    if torch.cuda.is_available():
        from megatron_posttrain.platform.cuda import CudaPlatform

        return CudaPlatform()
    from megatron_posttrain.platform.cpu import CpuPlatform

    return CpuPlatform()
