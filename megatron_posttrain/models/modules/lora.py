"""LoRA (arXiv 2106.09685, section 4.1) and DoRA (arXiv 2402.09353, eq. 5) beside one linear layer of megatron-core,
split over ranks as the layer is."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from megatron_posttrain.config.schema import LoraConfig
from megatron_posttrain.models.modules import kernels
from megatron_posttrain.models.modules.nf4 import values


@dataclass(frozen=True)
class Split:
    """How a linear layer is split over tensor parallel ranks. column: output features; row: input features; whole:
    every rank has all of them. Experts exchange nothing: their token dispatcher gathers the inputs and sums the outputs
    of the ranks."""

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
    """The change of a weight is scaling x B @ A, with an A for each of the layers that a fused weight consists of. A
    [adapters x rank, in], B [out, rank]: a row of B meets the A that `owners` [out] names; -1: no adapter. `dora`: row
    i of the sum becomes m_i times its direction; the norms are constants for the gradient (section 4.3)."""

    def __init__(self, weight: Tensor, inputs: int, owners: Tensor, lora: LoraConfig, split: Split) -> None:
        super().__init__()
        dtype, rank = weight.dtype, lora.rank
        device, count = owners.device, max(int(owners.max()) + 1, 1)
        self.a = nn.Parameter(torch.zeros(count * rank, inputs, dtype=dtype, device=device))
        self.b = nn.Parameter(torch.zeros(len(owners), rank, dtype=dtype, device=device))
        mask = owners[:, None] == torch.arange(count, device=device)
        self.mask = None if bool(mask.all()) else mask.to(dtype)  # [out, adapters]; not a buffer, it is no state
        self.scaling, self.dropout = scaling(lora.alpha, rank, lora.use_rslora), lora.dropout
        self.split, self.enabled = split, True
        self.m: nn.Parameter | None = None
        self._weight, self._owned = [weight], owners >= 0  # in a list: it is the layer's parameter
        if lora.use_dora:
            self.m = nn.Parameter(torch.ones(len(owners), dtype=dtype, device=device))
            self._mark(self.m, copied=split.by != "column")
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
    def merged(self) -> Tensor:
        """This rank's shard of the changed weight [out, in], summed in fp32. Collective with magnitudes."""
        whole = self._sum()
        return (whole if self.m is None else whole * self._scales(whole)[:, None]).to(self._weight[0].dtype)

    @torch.no_grad()
    def _sum(self) -> Tensor:
        return (self.up().float() @ self.a.float()).mul_(self.scaling).add_(values(self._weight[0]))

    @torch.no_grad()
    def begin(self) -> None:
        """Collective, once the layer has its weight: magnitudes that change nothing."""
        if self.m is not None:
            self.m.copy_(self._norms(self._sum()))

    def _norms(self, whole: Tensor) -> Tensor:
        """[out] fp32, of the rows of all ranks."""
        squares = whole.square().sum(1)
        if self.split.by == "row" and self.split.group.size() > 1:
            torch.distributed.all_reduce(squares, group=self.split.group)
        return squares.sqrt_()

    def _scales(self, whole: Tensor) -> Tensor:
        """[out] what rows of the changed weight are multiplied by: m / norm, differentiable in m; 1 where a row has no
        adapter. The norm is rounded as m is, so that it begins as exactly 1."""
        assert self.m is not None
        scales = self.m.float() / self._norms(whole).to(self.m.dtype).float()
        return torch.where(self._owned, scales, 1.0)

    def add_to(self, output: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's output with what the adapter changes. `bias`: that is in it."""
        change = self(x)
        if self.m is None:
            return output + change
        scales = self._scales(self._sum()).to(output.dtype)
        return output + (scales - 1) * (output if bias is None else output - bias) + scales * change

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


def add_to_logits(router: Any) -> None:
    """From now on a router of megatron-core, whose output is a choice, chooses by the sum with its adapter `lora`."""
    gating = router.gating

    def changed(x: Tensor) -> Tensor:
        logits = gating(x)
        return logits + router.lora(x).to(logits.dtype) if router.lora.enabled else logits

    router.gating = changed


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
    bias = getattr(module, "bias", None) if output[1] is None else None
    return (module.lora.add_to(output[0], x, bias if bias is not None and bias.numel() else None), *output[1:])


def add_to_grouped_output(module: Any, inputs: tuple[Any, ...], output: Any) -> Any:
    """As `add_to_output`, of Transformer Engine's grouped layer: `lora` has an adapter an expert, by number."""
    adapters = [module.lora[str(number)] for number in range(len(module.lora))]
    if not adapters[0].enabled:
        return None
    counts = inputs[1] if isinstance(inputs[1], list) else inputs[1].tolist()
    return (output[0] + grouped_change(adapters, inputs[0], counts), *output[1:])
