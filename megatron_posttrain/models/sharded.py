"""Weights between Hugging Face tensors and the shards of a parallel Megatron model."""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_posttrain.models import registry
from megatron_posttrain.models.architecture import Architecture
from megatron_posttrain.models.modules.nf4 import logical_shape, values
from megatron_posttrain.models.weights import Replicated, TensorPlan, unmerged
from megatron_posttrain.parallel.groups import Groups

# An expert's parameter in Transformer Engine's grouped linear layer, and its adapter's
GROUPED_EXPERT = re.compile(r"(?<=mlp\.experts\.)(linear_fc[12])\.(weight|bias)(\d+)$")
GROUPED_ADAPTER = re.compile(r"(?<=mlp\.experts\.)(linear_fc[12])\.lora\.(\d+)\.([ab])$")
ADAPTER = ".lora."  # in the names of adapters' parameters
ALIGNMENT = 16  # bytes; a view of bytes as a wider dtype has to start at a multiple of its size
BUCKET_BYTES = 1 << 30  # of a gathered bucket; one larger tensor makes a bucket by itself
LAYER = re.compile(r"^(.*\blayers)\.(\d+)(?=\.|$)")
EXPERT = re.compile(r"(?<=\.local_experts\.)(\d+)(?=\.)")


def position(group: ProcessGroup) -> tuple[int, int]:
    """(rank, size) of this process in a group."""
    return dist.get_rank(group), dist.get_world_size(group)


def unwrap(module: nn.Module) -> nn.Module:
    """The model itself, without the wrappers for data parallelism and mixed precision."""
    while isinstance(inner := getattr(module, "module", None), nn.Module):
        module = inner
    return module


def layer_numbers(model: nn.Module) -> dict[str, int]:
    """Global numbers from 0 by the local prefix of a layer, such as `decoder.layers.1`."""
    return {
        prefix: number - 1
        for prefix, module in model.named_modules()
        if LAYER.fullmatch(prefix) and isinstance(number := getattr(module, "layer_number", None), int)
    }


def table_name(name: str, numbers: dict[str, int], expert_offset: int) -> str:
    """The name in the weight table (global layer and expert numbers) of a local parameter or module."""
    name = GROUPED_EXPERT.sub(r"local_experts.\3.\1.\2", unmerged(name))
    name = GROUPED_ADAPTER.sub(r"local_experts.\2.\1.lora.\3", name)
    name = LAYER.sub(lambda match: f"{match[1]}.{numbers.get(match[0], match[2])}", name)
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
    parameter that the weight table does not have. Adapters' parameters come where `plans` are those of adapters,
    the model's where they are the model's.
    """
    adapters = any(ADAPTER in name for name in plans)
    offset = expert[0] * (arch.moe.num_experts // expert[1]) if arch.moe else 0
    for chunk in model_chunks:
        model = unwrap(chunk)
        numbers = layer_numbers(model)
        for local_name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            name = table_name(local_name, numbers, offset)
            if (ADAPTER in name) != adapters:
                continue
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
    shape = logical_shape(local)
    if shape == plan.local_shape(1):
        return 0, 1
    if shape == plan.local_shape(size):
        return rank, size
    raise ValueError(
        f"parameter '{plan.name}' has the local shape {list(shape)}, the weight table says "
        f"{list(plan.local_shape(size))} on each of {size} ranks"
    )


def merged(weight: Tensor) -> Tensor:
    """A rank's shard of a weight, with its adapter's change."""
    adapter = getattr(weight, "adapter", None)
    return values(weight) if adapter is None or not adapter.enabled else adapter.merged()


@dataclass
class Slot:
    """A row of the weight table in one layer, with all its experts: what one pipeline stage owns."""

    plans: list[TensorPlan]
    local: list[Tensor] = field(default_factory=list)  # this rank's shards, by expert; empty on other stages
    dtype: torch.dtype = torch.float32
    whole: bool = False  # every tensor parallel rank has all of it
    stage: int = -1
    shape: tuple[int, ...] = ()  # of a shard

    @property
    def kind(self) -> str:
        if self.plans[0].expert is not None:
            return "expert"
        return "whole" if self.whole else "tensor"

    @property
    def nbytes(self) -> int:
        """Of a shard, padded."""
        return -(-math.prod(self.shape) * self.dtype.itemsize // ALIGNMENT) * ALIGNMENT


# One gather within a bucket: a tensor, or the experts that have one local number (0 without experts) on all ranks
Unit = tuple[Slot, int]


class Exporter:
    """Knows once and for all which rank holds what; `hf_tensors()` can then be called at every refit.

    Collective over the pipeline group. `ValueError` when a tensor of the table is on no stage.
    """

    def __init__(
        self,
        model_chunks: Sequence[nn.Module],
        arch: Architecture,
        groups: Groups,
        plans: Iterable[TensorPlan] | None = None,
    ) -> None:
        """`plans`: of the adapters, where they are to be exported; None: the model's, with the adapters merged."""
        self.arch, self.groups = arch, groups
        self.plans = registry.tensors(arch) if plans is None else tuple(plans)
        self.tensor, self.expert_tensor = position(groups.tensor), position(groups.expert_tensor)
        self.expert = position(groups.expert)
        self.stage, self.stages = position(groups.pipeline)
        self.device = next(model_chunks[0].parameters()).device
        rows = groupby(self.plans, key=lambda plan: (id(plan.mapping), plan.layer))
        self.slots = [Slot(list(plans)) for _, plans in rows]
        self._find_local(model_chunks, arch)
        self._agree_on_owners()

    def _find_local(self, model_chunks: Sequence[nn.Module], arch: Architecture) -> None:
        plans = {plan.name: plan for plan in self.plans}
        found: dict[str, Tensor] = {}
        for plan, tensor in local_tensors(model_chunks, plans, arch, self.expert):
            found.setdefault(plan.name, tensor)  # tied: the embedding comes before its copy in the output layer
        for slot in self.slots:
            slot.local = [found[plan.name] for plan in slot.plans if plan.name in found]
            if slot.local:
                plan, first = slot.plans[0], slot.local[0]
                split = self.tensor if plan.expert is None else self.expert_tensor
                slot.whole = isinstance(plan.mapping, Replicated) or partition(plan, first, *split)[1] == 1
                slot.dtype = first.dtype

    def _agree_on_owners(self) -> None:
        mine = {i: (slot.dtype, slot.whole) for i, slot in enumerate(self.slots) if slot.local}
        stages: list[dict[int, tuple[torch.dtype, bool]]] = [mine] * self.stages
        if self.stages > 1:  # on a GPU a group's first collective takes 390 MiB, also of one rank
            dist.all_gather_object(stages, mine, group=self.groups.pipeline)
        for stage, held in reversed(list(enumerate(stages))):  # of two that hold a tensor the first owns it
            for index, (dtype, whole) in held.items():
                slot = self.slots[index]
                slot.dtype, slot.whole, slot.stage = dtype, whole, stage
        if missing := [slot.plans[0].name for slot in self.slots if slot.stage < 0]:
            raise ValueError(f"no pipeline stage holds '{missing[0]}' ({len(missing)} such)")
        for slot in self.slots:
            size = 1 if slot.whole else self.expert_tensor[1] if slot.kind == "expert" else self.tensor[1]
            slot.shape = slot.plans[0].local_shape(size)

    def _buckets(self) -> Iterator[list[Unit]]:
        """In an order that is the same on every rank; a bucket is of one stage and one kind."""
        ordered = sorted(self.slots, key=lambda slot: (slot.stage, slot.kind))
        for (_, kind), slots in groupby(ordered, key=lambda slot: (slot.stage, slot.kind)):
            copies = math.prod(group.size() for group in self._gathers(kind))
            ranks = self.expert[1] if kind == "expert" else 1
            bucket: list[Unit] = []
            filled = 0
            for unit in [(slot, number) for slot in slots for number in range(len(slot.plans) // ranks)]:
                nbytes = unit[0].nbytes * copies
                if bucket and filled + nbytes > BUCKET_BYTES:
                    yield bucket
                    bucket, filled = [], 0
                bucket.append(unit)
                filled += nbytes
            yield bucket

    def _gathers(self, kind: str) -> list[ProcessGroup]:
        if kind == "whole":
            return []
        groups = [self.groups.expert_tensor, self.groups.expert] if kind == "expert" else [self.groups.tensor]
        return [group for group in groups if group.size() > 1]

    def hf_tensors(self, *, of_stage: bool = False) -> Iterator[tuple[str, Tensor]]:
        """All tensors, whole, under the names that `transformers` and vLLM know, in the same order on every rank.

        Experts come one by one, but for families that only have them fused. Collective: every rank has to run
        through it. A rank holds one gathered bucket and one tensor more. `of_stage`: on every rank only those of
        its pipeline stage, which the stages do not tell each other.
        """
        return registry.layout(self.arch).assemble(self.tensors(of_stage))

    @property
    def writer_of(self) -> int | None:
        """The pipeline stage whose tensors this rank, the first one of it, is to write; None on all others."""
        groups = self.groups
        inside = (groups.tensor, groups.context, groups.data, groups.expert, groups.expert_tensor)
        return self.stage if not any(group.rank() for group in inside) else None

    def stage_of(self) -> dict[str, int]:
        """The pipeline stage that owns a tensor of the weight table."""
        return {name: slot.stage for slot in self.slots for plan in slot.plans for name in plan.hf}

    @torch.no_grad()
    def tensors(self, of_stage: bool = False) -> Iterator[tuple[str, Tensor]]:
        """As `hf_tensors`, of the table's names."""
        group = self.groups.pipeline
        for bucket in self._buckets():
            owner = bucket[0][0].stage
            if of_stage and owner != self.stage:
                continue
            gathered = self._gather(bucket, owner == self.stage)
            if self.stages > 1 and not of_stage:
                dist.broadcast(gathered, src=dist.get_global_rank(group, owner), group=group)
            yield from self._join(bucket, gathered)

    def _gather(self, bucket: list[Unit], own: bool) -> Tensor:
        """[shards, bytes]: this bucket from every rank that has a part of it; empty memory if not `own`."""
        length = sum(slot.nbytes for slot, _ in bucket)
        groups = self._gathers(bucket[0][0].kind)
        if not own:
            shards = math.prod(group.size() for group in groups)
            return torch.empty(shards, length, dtype=torch.uint8, device=self.device)
        flat = torch.empty(1, length, dtype=torch.uint8, device=self.device)
        start = 0
        for slot, number in bucket:
            _as(flat[0, start:], slot).copy_(merged(slot.local[number]))
            start += slot.nbytes
        for group in groups:
            wider = torch.empty(group.size() * flat.shape[0], length, dtype=torch.uint8, device=self.device)
            dist.all_gather_into_tensor(wider, flat, group=group)
            flat = wider
        return flat

    def _join(self, bucket: list[Unit], gathered: Tensor) -> Iterator[tuple[str, Tensor]]:
        start = 0
        for slot, number in bucket:
            shards = [_as(row[start:], slot) for row in gathered]
            start += slot.nbytes
            ranks = self.expert[1] if slot.kind == "expert" else 1  # ranks with experts of their own
            per_expert = len(shards) // ranks
            for rank in range(ranks):
                plan = slot.plans[rank * (len(slot.plans) // ranks) + number]
                mine = shards[rank * per_expert : (rank + 1) * per_expert]
                yield from plan.join(mine[:1] if slot.whole else mine).items()


def _as(data: Tensor, slot: Slot) -> Tensor:
    """The first bytes of `data` as a shard."""
    return data[: math.prod(slot.shape) * slot.dtype.itemsize].view(slot.dtype).view(slot.shape)
