"""Weights between Hugging Face tensors and the shards of a parallel Megatron model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_posttrain.checkpoint.hf import HfReader, table_reader
from megatron_posttrain.models import registry
from megatron_posttrain.models.architecture import Architecture
from megatron_posttrain.models.weights import TensorPlan

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


class ModelGroups(Protocol):
    """The process groups over which a model's weights are spread."""

    @property
    def tensor(self) -> ProcessGroup: ...
    @property
    def expert_tensor(self) -> ProcessGroup: ...
    @property
    def expert(self) -> ProcessGroup: ...
    @property
    def pipeline(self) -> ProcessGroup: ...


def position(group: ProcessGroup) -> tuple[int, int]:
    """(rank, size) of this process in a group."""
    return dist.get_rank(group), dist.get_world_size(group)


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
    model_chunks: Sequence[nn.Module],
    plans: dict[str, TensorPlan],
    arch: Architecture,
    expert: tuple[int, int] = (0, 1),
) -> Iterator[tuple[TensorPlan, Tensor]]:
    """Every parameter of this rank (and buffer that checkpoints hold) with its plan.

    The output layer that megatron-core holds on the last pipeline stage of a tied model comes with the
    plan of the word embeddings. `expert`: (rank, size) of expert parallelism. `ValueError` for a
    parameter that the weight table does not have.
    """
    offset = expert[0] * (arch.moe.num_experts // expert[1]) if arch.moe else 0
    for chunk in model_chunks:
        model = unwrap(chunk)
        numbers = {
            prefix: number - 1
            for prefix, module in model.named_modules()
            if LAYER.fullmatch(prefix) and isinstance(number := getattr(module, "layer_number", None), int)
        }
        for local_name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            name = table_name(local_name, numbers, offset)
            if arch.tied_embeddings and name == "output_layer.weight":
                name = "embedding.word_embeddings.weight"
            if name in plans:
                yield plans[name], tensor
            elif isinstance(tensor, nn.Parameter):
                raise ValueError(f"parameter '{local_name}' ('{name}') is not in the family's weight table")


def partition(plan: TensorPlan, local: Tensor, rank: int, size: int) -> tuple[int, int]:
    """(rank, size) of the split of a local tensor: (0, 1) where the module keeps it whole.

    Transformer Engine holds MLA's down-projections whole on every rank, megatron-core's own layers split
    them. `ValueError` when the tensor has neither shape.
    """
    if tuple(local.shape) == plan.local_shape(1):
        return 0, 1
    if tuple(local.shape) == plan.local_shape(size):
        return rank, size
    raise ValueError(
        f"parameter '{plan.name}' has the local shape {list(local.shape)}, the weight table says "
        f"{list(plan.local_shape(size))} on each of {size} ranks"
    )


@torch.no_grad()
def load_hf(
    model_chunks: Sequence[nn.Module], arch: Architecture, reader: HfReader, groups: ModelGroups | None = None
) -> None:
    """Fill this rank's parameters from a Hugging Face directory, reading only the slices that it holds.

    Values are converted to the parameters' dtype and device. `groups`: None for a model on one rank.
    The caller has checked the directory (`checkpoint.hf.check_directory`).
    """
    read = table_reader(reader, arch)
    plans = {plan.name: plan for plan in registry.tensors(arch)}
    tensor, expert_tensor, expert = ((0, 1), (0, 1), (0, 1))
    if groups is not None:
        tensor, expert_tensor = position(groups.tensor), position(groups.expert_tensor)
        expert = position(groups.expert)
    for plan, local in local_tensors(model_chunks, plans, arch, expert):
        rank, size = partition(plan, local, *(tensor if plan.expert is None else expert_tensor))
        plan.fill(local, read, rank, size)
