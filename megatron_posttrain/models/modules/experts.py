"""Experts of one rank by grouped matrix products: two kernels a layer, however many experts there are."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.fusions.fused_bias_swiglu import weighted_bias_swiglu_impl
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor
from torch.nn import functional as F

from megatron_posttrain.models.modules.lora import adapters_of, grouped_change

Tensors = Sequence[Tensor]


class GroupedExperts(SequentialMLP):
    """megatron-core's SequentialMLP, its parameters and checkpoints, with another forward pass.

    The weights stay one parameter an expert and projection. They are laid out so that all experts' weights are
    one strided view [experts, out, in], before and after data parallelism moves them to its own buffer; where
    they are not, they are copied together. Linear layers that were replaced run one by one as in stock.
    """

    local_experts: torch.nn.ModuleList

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        experts = _LastFirst(self.local_experts)
        self.local_experts = experts
        for name in ("linear_fc1", "linear_fc2"):
            weights = [getattr(expert, name).weight for expert in experts]
            for weight, part in zip(weights, torch.stack([w.data for w in weights]), strict=True):
                weight.data = part

    def forward(
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """[t, hidden], sorted by expert, and their router weights [t] -> [t, hidden], and no bias."""
        fc1: list[Any] = [expert.linear_fc1 for expert in self.local_experts]
        fc2: list[Any] = [expert.linear_fc2 for expert in self.local_experts]
        stock = all(type(m) is ColumnParallelLinear for m in fc1) and all(type(m) is RowParallelLinear for m in fc2)
        counts = tokens_per_expert.tolist()
        if not stock or not sum(counts) or self.config.moe_apply_probs_on_input:
            return super().forward(permuted_local_hidden_states, tokens_per_expert, permuted_probs)
        x = permuted_local_hidden_states
        ends = torch.tensor(counts).cumsum(0).to(x.device, torch.int32, non_blocking=True)
        x = _with_adapters(fc1, x, counts, _GroupedLinear.apply(x, ends, counts, *(m.weight for m in fc1)))
        if fc1[0].bias is not None:
            x = x + _rows_of([m.bias for m in fc1], ends, len(x))
        x = self._activate(x, permuted_probs)
        x = _with_adapters(fc2, x, counts, _GroupedLinear.apply(x, ends, counts, *(m.weight for m in fc2)))
        if fc2[0].bias is not None:
            x = x + (_rows_of([m.bias for m in fc2], ends, len(x)) * permuted_probs[:, None]).to(x.dtype)
        return x, None

    def _activate(self, x: Tensor, probs: Tensor) -> Tensor:
        """The gated unit times the router's weight: [t, 2 * ffn] -> [t, ffn]."""
        config = self.config
        plain = config.activation_func is F.silu and config.glu_linear_offset == 0
        if config.bias_activation_fusion and plain and config.activation_func_clamp_value is None:
            return weighted_bias_swiglu_impl(x, None, probs[:, None])
        gate, linear = x.chunk(2, dim=-1)
        if (limit := config.activation_func_clamp_value) is not None:
            gate, linear = gate.clamp(max=limit), linear.clamp(min=-limit, max=limit)
        return (config.activation_func(gate) * (linear + config.glu_linear_offset) * probs[:, None]).to(x.dtype)


class _LastFirst(torch.nn.ModuleList):
    """Iterates from the first module, names its parameters from the last. megatron-core's gradient and parameter
    buffers hold parameters in reverse order of their names; a strided view of all experts needs the first expert at the
    lowest address."""

    def __init__(self, modules: torch.nn.ModuleList) -> None:
        torch.nn.Module.__init__(self)
        for index in reversed(range(len(modules))):
            self.add_module(str(index), modules[index])

    def __getitem__(self, index: Any) -> Any:
        return self._modules[str(index)]

    def __iter__(self) -> Iterator[Any]:
        return iter([self[index] for index in range(len(self))])


class _GroupedLinear(torch.autograd.Function):
    """x[rows of expert e] @ weights[e].T for all e. The joined weights are a view and are not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ends: Tensor, counts: list[int], *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, ends, *weights)
        ctx.counts = counts
        return F.grouped_mm(x, joined(weights).transpose(-2, -1), offs=ends)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, ends, *weights = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x = F.grouped_mm(grad, joined(weights), offs=ends) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[3]:
            return grad_x, None, None, *(None for _ in weights)
        grads = F.grouped_mm(grad.t(), x.contiguous(), offs=ends)
        if unused := [e for e, count in enumerate(ctx.counts) if count == 0]:
            grads[unused] = 0  # a kernel need not write the product of no rows
        main = [w.main_grad for w in weights if hasattr(w, "main_grad")]
        view = strided(main) if len(main) == len(weights) else None
        if view is not None:
            # megatron-core's flag for kernels that add to the main gradients themselves: one kernel here
            # instead of one an expert. Its hook still wants to see a gradient of each parameter.
            view.add_(grads)
            for weight in weights:
                weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        return grad_x, None, None, *grads.unbind()


def _with_adapters(modules: Sequence[Any], x: Tensor, counts: Sequence[int], output: Tensor) -> Tensor:
    adapters = adapters_of(modules)
    return output + grouped_change(adapters, x, counts) if adapters else output


def joined(weights: Tensors) -> Tensor:
    """[experts, out, in]: a view where the weights lie evenly spaced in one storage, else a copy."""
    view = strided(weights)
    return torch.stack(tuple(weights)) if view is None else view


def strided(tensors: Tensors) -> Tensor | None:
    """Equal, contiguous tensors at equal distances in one storage as one view; None where they are not so."""
    first = tensors[0].detach()
    if not all(t.is_contiguous() for t in tensors) or len({t.untyped_storage().data_ptr() for t in tensors}) > 1:
        return None
    starts = [t.storage_offset() for t in tensors]
    step = starts[1] - starts[0] if len(starts) > 1 else first.numel()
    if step < first.numel() or any(b - a != step for a, b in itertools.pairwise(starts)):
        return None
    return first.as_strided((len(tensors), *first.shape), (step, *first.stride()), starts[0])


def _rows_of(biases: Tensors, ends: Tensor, rows: int) -> Tensor:
    """The bias of every row's expert: [t, out]."""
    expert = torch.searchsorted(ends, torch.arange(rows, device=ends.device, dtype=ends.dtype), right=True)
    return torch.stack(tuple(biases))[expert]
