"""Weights between Hugging Face tensors and the shards of a parallel Megatron model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from megatron_posttrain.models import registry
from megatron_posttrain.models.architecture import Architecture
from megatron_posttrain.models.weights import Read, TensorPlan

# Transformer Engine merges a norm into the linear layer that follows it, and numbers the experts of
# its grouped linear layer: its name on the left, that of the table on the right.
ALIASES = (
    (re.compile(r"self_attention\.linear_qkv\.layer_norm_"), "input_layernorm."),
    (re.compile(r"mlp\.linear_fc1\.layer_norm_"), "pre_mlp_layernorm."),
    (re.compile(r"linear_q_up_proj\.layer_norm_"), "q_layernorm."),
    (re.compile(r"linear_kv_up_proj\.layer_norm_"), "kv_layernorm."),
    (
        re.compile(r"mlp\.experts\.(linear_fc[12])\.(weight|bias)(\d+)$"),
        r"mlp.experts.local_experts.\3.\1.\2",
    ),
)
LAYER = re.compile(r"^(.*\blayers)\.(\d+)(?=\.|$)")
EXPERT = re.compile(r"(?<=\.local_experts\.)(\d+)(?=\.)")


def unwrap(module: nn.Module) -> nn.Module:
    """The model itself, without the wrappers for data parallelism and mixed precision."""
    while isinstance(inner := getattr(module, "module", None), nn.Module):
        module = inner
    return module


def table_name(name: str, layer_numbers: dict[str, int], expert_offset: int) -> str:
    """The name in the weight table (global layer and expert numbers) of a local parameter.

    `layer_numbers`: global number from 0 by the local prefix of a layer, such as `decoder.layers.1`.
    """
    for pattern, replacement in ALIASES:
        name = pattern.sub(replacement, name)
    name = LAYER.sub(lambda match: f"{match[1]}.{layer_numbers.get(match[0], match[2])}", name)
    return EXPERT.sub(lambda match: str(int(match[1]) + expert_offset), name)


def local_tensors(
    model_chunks: Sequence[nn.Module], plans: dict[str, TensorPlan], tied: bool, expert_offset: int
) -> Iterator[tuple[TensorPlan, Tensor]]:
    """Every parameter of this rank (and buffer that checkpoints hold) with its plan.

    The output layer that megatron-core holds on the last pipeline stage of a tied model comes with the
    plan of the word embeddings. `ValueError` for a parameter that the weight table does not have.
    """
    for chunk in model_chunks:
        model = unwrap(chunk)
        numbers = {
            prefix: number - 1
            for prefix, module in model.named_modules()
            if LAYER.fullmatch(prefix) and isinstance(number := getattr(module, "layer_number", None), int)
        }
        for local_name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            name = table_name(local_name, numbers, expert_offset)
            if tied and name == "output_layer.weight":
                name = "embedding.word_embeddings.weight"
            if name in plans:
                yield plans[name], tensor.data
            elif isinstance(tensor, nn.Parameter):
                raise ValueError(f"parameter '{local_name}' ('{name}') is not in the family's weight table")


def partition(plan: TensorPlan, local: Tensor, rank: int, size: int) -> tuple[int, int]:
    """(rank, size) of the split of a local tensor: (0, 1) where the module keeps it whole.

    Transformer Engine holds MLA's down-projections whole on every rank, megatron-core's own layers split
    them. `ValueError` when the tensor has neither shape.
    """
    if tuple(local.shape) == plan.local_shape(size):
        return rank, size
    if tuple(local.shape) == plan.local_shape(1):
        return 0, 1
    raise ValueError(
        f"parameter '{plan.name}' has the local shape {list(local.shape)}, the weight table says "
        f"{list(plan.local_shape(size))} on each of {size} ranks"
    )


@torch.no_grad()
def load_hf(
    model_chunks: Sequence[nn.Module],
    arch: Architecture,
    read: Read,
    *,
    tp_rank: int = 0,
    tp_size: int = 1,
    etp_rank: int = 0,
    etp_size: int = 1,
    ep_rank: int = 0,
    ep_size: int = 1,
) -> None:
    """Fill this rank's parameters from Hugging Face tensors, reading only the slices that it holds.

    `read` gives the tensors of the weight table by name, as `checkpoint.hf.table_reader` does. Values are
    converted to the parameters' dtype and device. The caller has checked the directory.
    """
    plans = {plan.name: plan for plan in registry.tensors(arch)}
    expert_offset = ep_rank * (arch.moe.num_experts // ep_size) if arch.moe else 0
    for plan, tensor in local_tensors(model_chunks, plans, arch.tied_embeddings, expert_offset):
        rank, size = (tp_rank, tp_size) if plan.expert is None else (etp_rank, etp_size)
        rank, size = partition(plan, tensor, rank, size)
        plan.fill(tensor, read, rank, size)
