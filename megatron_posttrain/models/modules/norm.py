"""RMSNorm (Zhang and Sennrich 2019) in torch, for CPU and CUDA."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class RMSNorm(torch.nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; the mean is taken in fp32. megatron-core's own torch
    norm refuses sequence parallelism (torch_norm 32 in 0.16.1). Here the weight is marked, so that its gradient is
    summed over tensor ranks that each saw a part of the sequence."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__()
        self.eps = eps
        device = torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float32:
            return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)
        # The order of the published models: normalise in fp32, round, then scale.
        return self.weight * F.rms_norm(x.float(), (x.shape[-1],), None, self.eps).to(x.dtype)
