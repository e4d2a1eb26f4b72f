"""A parallel Megatron model filled from a Hugging Face directory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from megatron_posttrain.checkpoint.hf import HfReader, directory_layout, model_directory, table_reader
from megatron_posttrain.config.schema import ModelConfig
from megatron_posttrain.models import registry
from megatron_posttrain.models.architecture import Architecture
from megatron_posttrain.models.modules.nf4 import Part
from megatron_posttrain.models.sharded import local_tensors, partition, position
from megatron_posttrain.models.weights import Read, TensorPlan
from megatron_posttrain.parallel.groups import Groups


def experts_are_fused(model: ModelConfig, arch: Architecture) -> bool:
    """Whether the directory of a model holds its experts in 3-D tensors."""
    if model.random_init:
        return registry.layout(arch).fused
    return directory_layout(HfReader(model_directory(model.path)), arch).fused


@torch.no_grad()
def load_hf(model_chunks: Sequence[nn.Module], arch: Architecture, reader: HfReader, groups: Groups) -> None:
    """Fill this rank's parameters from a Hugging Face directory, reading only the slices that it holds.

    Values are converted to the parameters' dtype and device, or to NF4, a tensor at a time. The caller has
    checked the directory (`checkpoint.hf.check_directory`).
    """
    read = table_reader(reader, arch)
    plans = {plan.name: plan for plan in registry.tensors(arch)}
    tensor, expert_tensor = position(groups.tensor), position(groups.expert_tensor)
    for plan, local in local_tensors(model_chunks, plans, arch, position(groups.expert)):
        rank, size = partition(plan, local, *(tensor if plan.expert is None else expert_tensor))
        if (nf4 := getattr(local, "nf4", None)) is None:
            plan.fill(local, read, rank, size)
        else:
            nf4.store([partial(_whole, read, name) for name in plan.hf], list(_parts(plan, rank, size)))


def _whole(read: Read, name: str) -> Tensor:
    return read(name)[:]


def _parts(plan: TensorPlan, rank: int, size: int) -> Iterator[Part]:
    """Of the plan's tensors, what shard `rank` of `size` has."""
    for source, start, stop in plan.mapping.segments(rank, size):
        assert source is not None
        rows, columns = plan.shapes[source]
        yield Part(source, (start, stop), (0, columns)) if plan.mapping.dim == 0 else Part(0, (0, rows), (start, stop))
