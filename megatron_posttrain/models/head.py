"""The output layer on the tokens that are asked for."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from megatron_posttrain.models.sharded import unwrap
from megatron_posttrain.platform import platform


class ScalarHead(torch.nn.Module):
    """[n, hidden] -> [n, 1] fp32 in place of the output layer, the same on all tensor ranks; for `output_rows`. Begins
    from N(0, 1 / (hidden + 1)) (arXiv 2009.01325, appendix B), the same numbers under every layout."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        hidden = config.hidden_size
        drawn = torch.randn(1, hidden, generator=torch.Generator().manual_seed(0)) / math.sqrt(hidden + 1)
        self.weight = torch.nn.Parameter(drawn.to(config.params_dtype))
        self.sequence_parallel, self.allreduce_dgrad = config.sequence_parallel, False

    def forward(self, hidden: Tensor, weight: None = None, runtime_gather_output: None = None) -> tuple[Tensor, None]:
        return torch.nn.functional.linear(hidden.float(), self.weight.float()), None


class Fp32Product(torch.autograd.Function):
    """[..., hidden] and weight [columns, hidden] -> [..., columns] fp32; gradients in their own dtype."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return platform().fp32_product(hidden.flatten(0, -2), weight.t()).view(*hidden.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        hidden, weight = ctx.saved_tensors
        gradient = gradient.to(weight.dtype)
        of_hidden = gradient @ weight if ctx.needs_input_grad[0] else None
        of_weight = gradient.flatten(0, -2).t() @ hidden.flatten(0, -2) if ctx.needs_input_grad[1] else None
        return of_hidden, of_weight


def keep_fp32(layer: Any) -> None:
    """Logits of an output layer are fp32 from here on, not rounded to the model's dtype; inside of `output_rows`."""

    def forward(
        hidden: Tensor, weight: Tensor | None = None, runtime_gather_output: None = None
    ) -> tuple[Tensor, None]:
        from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region

        if layer.allreduce_dgrad:
            hidden = copy_to_tensor_model_parallel_region(hidden)
        return Fp32Product.apply(hidden, layer.weight if weight is None else weight), None

    layer.forward = forward


@contextmanager
def output_rows(model: torch.nn.Module, rows: Tensor) -> Iterator[None]:
    """Forward passes meanwhile give logits [1, n, vocabulary] of `rows` [n] of this context rank's tokens only. Nothing
    changes in a chunk that has no output layer. Under sequence parallelism the hidden states are gathered here instead
    of in the layer, because rows are numbers of all tensor ranks' tokens."""
    layer: Any = getattr(unwrap(model), "output_layer", None)
    if layer is None:
        yield
        return
    split = layer.sequence_parallel

    def select(module: torch.nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

        hidden = inputs[0]
        if split:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        return (hidden.index_select(0, rows),)

    def as_matrix(module: torch.nn.Module, inputs: tuple[Tensor], output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        # megatron-core 0.16.1 then transposes tokens and batch, so the gradient comes back with such strides that
        # torch 2.13 multiplies it with a frozen weight a token at a time: 15% of a LoRA step on CPU.
        return output[0].squeeze(1).unsqueeze(1), output[1]

    hooks = layer.register_forward_pre_hook(select), layer.register_forward_hook(as_matrix)
    if split:
        layer.sequence_parallel, layer.allreduce_dgrad = False, True
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        if split:
            layer.sequence_parallel, layer.allreduce_dgrad = True, False
