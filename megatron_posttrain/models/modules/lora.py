"""LoRA (arXiv 2106.09685, section 4.1) beside one linear layer of megatron-core, split over ranks as the layer is."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from megatron_posttrain.models.modules import kernels


@dataclass(frozen=True)
class Split:
    """How a linear layer is split over tensor parallel ranks.

    column: output features; row: input features; whole: every rank has all of them. Experts exchange nothing: their
    token dispatcher gathers the inputs and sums the outputs of the ranks.
    """

    by: Literal["column", "row", "whole"]
    group: ProcessGroup
    sequence: bool = False  # sequence parallel: inputs of column, outputs of row are split by tokens
    expert: bool = False

    def exchange(self, x: Tensor) -> Tensor:
        """The product with A [tokens, ..., rank], as B needs it: what the layer does, on `rank` features only."""
        from megatron.core.tensor_parallel import mappings

        if self.expert or self.group.size() == 1 or self.by == "whole":
            return x
        if self.by == "column":
            if self.sequence:
                return mappings.gather_from_sequence_parallel_region(x, group=self.group)
            return mappings.copy_to_tensor_model_parallel_region(x, group=self.group)
        if self.sequence:
            return mappings.reduce_scatter_to_sequence_parallel_region(x, group=self.group)
        return mappings.reduce_from_tensor_model_parallel_region(x, group=self.group)


def scaling(alpha: float, rank: int, rank_stabilised: bool) -> float:
    """alpha / rank, or alpha / sqrt(rank) (rank-stabilised LoRA, arXiv 2312.03732, section 3)."""
    return alpha / (math.sqrt(rank) if rank_stabilised else rank)


class LoraLinear(nn.Module):
    """The change of a weight is scaling x B @ A, with an A for each of the layers that a fused weight consists of.

    A [adapters x rank, in], B [out, rank]: a row of B meets the A that `owners` [out] names; -1: no adapter.
    """

    def __init__(
        self, inputs: int, owners: Tensor, rank: int, scaling: float, dropout: float, split: Split, dtype: torch.dtype
    ) -> None:
        super().__init__()
        device, count = owners.device, max(int(owners.max()) + 1, 1)
        self.a = nn.Parameter(torch.zeros(count * rank, inputs, dtype=dtype, device=device))
        self.b = nn.Parameter(torch.zeros(len(owners), rank, dtype=dtype, device=device))
        mask = owners[:, None] == torch.arange(count, device=device)
        self.mask = None if bool(mask.all()) else mask.to(dtype)  # [out, adapters]; not a buffer, it is no state
        self.rank, self.scaling, self.dropout, self.split = rank, scaling, dropout, split
        self.enabled = True
        self._mark(self.a, copied=split.by != "row")
        self._mark(self.b, copied=split.by != "column")

    def _mark(self, parameter: Any, copied: bool) -> None:
        """What megatron-core's gradient reduction and norm have to know; `copied`: every rank has all of it."""
        split = self.split
        parameter.tensor_model_parallel = not copied or split.expert
        parameter.sequence_parallel = split.sequence and not split.expert and copied  # its gradients are summed
        if split.expert:
            parameter.allreduce = False
            parameter.shared = copied and split.group.rank() > 0  # counts once in the norm
            if copied and split.group.size() > 1:
                parameter.sum_gradients_over = split.group

    def up(self) -> Tensor:
        """B [out, adapters x rank], zero where a row does not meet an A."""
        if self.mask is None:
            return self.b
        return (self.mask[:, :, None] * self.b[:, None, :]).flatten(1)

    @torch.no_grad()
    def change(self) -> Tensor:
        """Of this rank's weight [out, in], in fp32."""
        return (self.up().float() @ self.a.float()).mul_(self.scaling)

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, ..., in] as the layer is given it -> what is added to the layer's output."""
        down = F.linear(self.dropped(x), self.a) * self.scaling
        return F.linear(self.split.exchange(down), self.up())

    def dropped(self, x: Tensor) -> Tensor:
        """`x` after dropout. The mask follows from one number of torch's default generator on the CPU, which the
        engine seeds every step and recomputation sets back; ranks with the same inputs draw the same mask."""
        if not self.dropout or not self.training:
            return x
        same_rows = not (self.split.expert or self.split.sequence or self.split.by == "row")
        salt = 0 if same_rows else 1 + torch.distributed.get_rank()
        seed = int(torch.randint(1 << 48, (), device="cpu")) + salt
        generator = torch.Generator(x.device).manual_seed(seed)
        keep = torch.rand(x.shape, generator=generator, device=x.device) >= self.dropout
        return x * keep / (1 - self.dropout)


def grouped_change(adapters: Sequence[LoraLinear], x: Tensor, counts: Sequence[int]) -> Tensor:
    """What the adapters of a rank's experts add to their outputs: [t, in], `counts` rows an expert, -> [t, out]."""
    first = adapters[0]
    x, counts = first.dropped(x), list(counts)
    whole = len(x) == sum(counts) and first.a.dtype == torch.bfloat16 and len(first.a) % 8 == 0  # 16 bytes a row
    if not (whole and kernels.grouped_matmul(first.a.dtype)):
        parts = zip(adapters, x.split(counts), strict=True)
        return torch.cat([F.linear(F.linear(rows, m.a) * m.scaling, m.up()) for m, rows in parts])
    ends = torch.tensor(counts).cumsum(0).to(x.device, torch.int32, non_blocking=True)
    a, b = torch.stack([m.a for m in adapters]), torch.stack([m.up() for m in adapters])
    down = F.grouped_mm(x, a.transpose(-2, -1), offs=ends) * first.scaling
    return F.grouped_mm(down, b.transpose(-2, -1), offs=ends)


def adapters_of(modules: Sequence[Any]) -> list[LoraLinear]:
    """Of all the linear layers; none where they have none."""
    found = [module.lora for module in modules if hasattr(module, "lora")]
    return found if all(adapter.enabled for adapter in found) else []


def add_to_output(module: Any, inputs: tuple[Any, ...], output: Any) -> Any:
    """Forward hook of a linear layer of megatron-core or Transformer Engine that has an adapter as `lora`."""
    if not module.lora.enabled:
        return None
    x, norm = inputs[0], getattr(module, "layer_norm_weight", None)
    if norm is not None:  # Transformer Engine merges a norm into the layer that follows it
        x = F.rms_norm(x, (x.shape[-1],), norm, module.eps)
    return (output[0] + module.lora(x), *output[1:])


def add_to_grouped_output(module: Any, inputs: tuple[Any, ...], output: Any) -> Any:
    """As `add_to_output`, of Transformer Engine's grouped layer: `lora` has an adapter an expert, by number."""
    adapters = [module.lora[str(number)] for number in range(len(module.lora))]
    if not adapters[0].enabled:
        return None
    counts = inputs[1] if isinstance(inputs[1], list) else inputs[1].tolist()
    return (output[0] + grouped_change(adapters, inputs[0], counts), *output[1:])
