"""Which of torch's fast kernels this process can use. The only place where modules ask for device and dtype."""

import functools
import inspect

import torch
from torch.nn import functional as F

from megatron_posttrain.platform import platform


def grouped_matmul(dtype: torch.dtype) -> bool:
    """Many matrix products in one kernel. On CPU torch runs it as a loop, which gains nothing."""
    return platform().name == "cuda" and dtype == torch.bfloat16 and hasattr(F, "grouped_mm")


def varlen_attention(dtype: torch.dtype, head_dim: int) -> bool:
    """Flash attention over packed sequences without padding; its kernels take head sizes of 8, 16, ... 256."""
    fits = dtype in (torch.bfloat16, torch.float16) and head_dim % 8 == 0 and head_dim <= 256
    return platform().name == "cuda" and fits and torch_has_varlen()


@functools.cache
def torch_has_varlen() -> bool:
    """Whether torch's function can express causal attention with fewer key heads, a scale and a window."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return {"scale", "window_size", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys()


def compiled_pointwise() -> bool:
    """megatron-core's fused activation and residual functions; made by torch.compile, so CUDA only."""
    return platform().name == "cuda"
