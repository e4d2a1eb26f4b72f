"""A parallel Megatron model filled from a Hugging Face directory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_posttrain.checkpoint.hf import HfReader, table_reader
from megatron_posttrain.models import registry
from megatron_posttrain.models.architecture import Architecture
from megatron_posttrain.models.common import SCORE
from megatron_posttrain.models.sharded import local_tensors, partition, position
from megatron_posttrain.parallel.groups import Groups


@torch.no_grad()
def load_hf(model_chunks: Sequence[nn.Module], arch: Architecture, reader: HfReader, groups: Groups) -> None:
    """Collective: fill this rank's parameters from a Hugging Face directory, reading only slices that it holds.

    Of ranks that hold the same, each reads a share and gives it to the others: the directory is read once, by all
    ranks together. Values are converted to the parameters' dtype and device. The caller has checked the directory
    (`checkpoint.hf.check_directory`). A scalar head that the directory does not have stays as it was made.
    """
    read = table_reader(reader, arch)
    new_head = arch.scalar_head and SCORE not in reader.names()
    plans = {plan.name: plan for plan in registry.tensors(arch)}
    tensor, expert_tensor = position(groups.tensor), position(groups.expert_tensor)
    given: list[tuple[Tensor, ProcessGroup, int]] = []
    loads: dict[ProcessGroup, list[int]] = {}
    for plan, local in local_tensors(model_chunks, plans, arch, position(groups.expert)):
        if new_head and plan.hf == (SCORE,):
            continue
        rank, size = partition(plan, local, *(tensor if plan.expert is None else expert_tensor))
        group = groups.copies if plan.expert is None else groups.expert_copies
        load = loads.setdefault(group, [0] * group.size())
        source = load.index(min(load))
        load[source] += local.numel()
        given.append((local, group, source))
        if source == group.rank():
            plan.fill(local, read, rank, size)
    for local, group, source in given:  # after all were read: they read at the same time
        if group.size() > 1:
            dist.broadcast(local, src=dist.get_global_rank(group, source), group=group)
