"""A parallel Megatron model filled from a Hugging Face directory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from megatron_posttrain.checkpoint.hf import HfReader, directory_layout, model_directory, table_reader
from megatron_posttrain.config.schema import ModelConfig
from megatron_posttrain.models import registry
from megatron_posttrain.models.architecture import Architecture
from megatron_posttrain.models.sharded import local_tensors, partition, position
from megatron_posttrain.parallel.groups import Groups


def experts_are_fused(model: ModelConfig, arch: Architecture) -> bool:
    """Whether the directory of a model holds its experts in 3-D tensors."""
    if model.random_init:
        return registry.layout(arch).fused
    return directory_layout(HfReader(model_directory(model.path)), arch).fused


@torch.no_grad()
def load_hf(model_chunks: Sequence[nn.Module], arch: Architecture, reader: HfReader, groups: Groups) -> None:
    """Fill this rank's parameters from a Hugging Face directory, reading only the slices that it holds.

    Values are converted to the parameters' dtype and device. The caller has checked the directory
    (`checkpoint.hf.check_directory`).
    """
    read = table_reader(reader, arch)
    plans = {plan.name: plan for plan in registry.tensors(arch)}
    tensor, expert_tensor = position(groups.tensor), position(groups.expert_tensor)
    for plan, local in local_tensors(model_chunks, plans, arch, position(groups.expert)):
        rank, size = partition(plan, local, *(tensor if plan.expert is None else expert_tensor))
        plan.fill(local, read, rank, size)
