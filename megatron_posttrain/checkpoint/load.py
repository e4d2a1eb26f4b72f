"""A parallel Megatron model filled from a Hugging Face directory."""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_posttrain.checkpoint.hf import HfReader, directory_layout, model_directory, table_reader
from megatron_posttrain.config.schema import ModelConfig
from megatron_posttrain.models import registry
from megatron_posttrain.models.architecture import Architecture
from megatron_posttrain.models.common import SCORE
from megatron_posttrain.models.modules.nf4 import Part
from megatron_posttrain.models.sharded import local_tensors, partition, position
from megatron_posttrain.models.weights import TensorPlan
from megatron_posttrain.parallel.groups import Groups


def experts_are_fused(model: ModelConfig, arch: Architecture) -> bool:
    """Whether the directory of a model holds its experts in 3-D tensors."""
    if model.random_init:
        return registry.layout(arch).fused
    return directory_layout(HfReader(model_directory(model.path)), arch).fused


@torch.no_grad()
def load_hf(model_chunks: Sequence[nn.Module], arch: Architecture, reader: HfReader, groups: Groups) -> None:
    """Collective: fill this rank's parameters from a Hugging Face directory, reading only slices that it holds.

    Of ranks that hold the same, each reads a share and gives it to the others: the directory is read once, by all
    ranks together, NF4 apart. Values are converted to the parameters' dtype and device. The caller has checked it
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
        if (nf4 := getattr(local, "nf4", None)) is not None:  # a tensor at a time, by every rank
            nf4.store([lambda name=name: read(name)[:] for name in plan.hf], list(_parts(plan, rank, size)))
            continue
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


def _parts(plan: TensorPlan, rank: int, size: int) -> Iterator[Part]:
    """Of the plan's tensors, what shard `rank` of `size` has."""
    for source, start, stop in plan.mapping.segments(rank, size):
        assert source is not None
        rows, columns = plan.shapes[source]
        yield Part(source, (start, stop), (0, columns)) if plan.mapping.dim == 0 else Part(0, (0, rows), (start, stop))
