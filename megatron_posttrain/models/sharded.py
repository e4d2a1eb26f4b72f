"""Weights between Hugging Face tensors and the shards of a parallel Megatron model."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_posttrain.models import registry
from megatron_posttrain.models.architecture import Architecture
from megatron_posttrain.models.disk_layout import DiskLayout
from megatron_posttrain.models.modules.nf4 import logical_shape
from megatron_posttrain.models.shares import Shares, Slot, Wanted, all_of
from megatron_posttrain.models.weights import Replicated, TensorPlan, unmerged
from megatron_posttrain.parallel.groups import Groups
from megatron_posttrain.parallel.layout import Layout

Chunks = Sequence[nn.Module]
Held = tuple[list[Slot], tuple[TensorPlan, ...], DiskLayout, Layout]
# An expert's parameter in Transformer Engine's grouped linear layer, and its adapter's
GROUPED_EXPERT = re.compile(r"(?<=mlp\.experts\.)(linear_fc[12])\.(weight|bias)(\d+)$")
GROUPED_ADAPTER = re.compile(r"(?<=mlp\.experts\.)(linear_fc[12])\.lora\.(\d+)\.([ab])$")
ADAPTER = ".lora."  # in the names of adapters' parameters
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


def naming(model: nn.Module, arch: Architecture, expert: tuple[int, int]) -> Callable[[str], str]:
    """What gives a local parameter or module its name in the weight table, with global numbers from 0 of layers and
    experts. `expert`: (rank, size) of expert parallelism."""
    numbers = {
        prefix: number - 1
        for prefix, module in model.named_modules()
        if LAYER.fullmatch(prefix) and isinstance(number := getattr(module, "layer_number", None), int)
    }
    offset = expert[0] * (arch.moe.num_experts // expert[1]) if arch.moe else 0

    def table_name(name: str) -> str:
        name = GROUPED_EXPERT.sub(r"local_experts.\3.\1.\2", unmerged(name))
        name = GROUPED_ADAPTER.sub(r"local_experts.\2.\1.lora.\3", name)
        name = LAYER.sub(lambda match: f"{match[1]}.{numbers.get(match[0], match[2])}", name)
        return EXPERT.sub(lambda match: str(int(match[1]) + offset), name)

    return table_name


def local_tensors(
    chunks: Chunks, plans: dict[str, TensorPlan], arch: Architecture, expert: tuple[int, int]
) -> Iterator[tuple[TensorPlan, Tensor]]:
    """Every parameter of this rank (and buffer that checkpoints hold) with its plan.

    The output layer that megatron-core holds on the last pipeline stage of a tied model comes with the
    plan of the word embeddings. `expert`: (rank, size) of expert parallelism. `ValueError` for a
    parameter that the weight table does not have. Adapters' parameters come where `plans` are those of adapters,
    the model's where they are the model's.
    """
    adapters = any(ADAPTER in name for name in plans)
    for model in map(unwrap, chunks):
        table_name = naming(model, arch, expert)
        for local_name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            name = table_name(local_name)
            if (ADAPTER in name) != adapters:
                continue
            if arch.tied_embeddings and name == "output_layer.weight":
                name = "embedding.word_embeddings.weight"
            if name in plans:
                yield plans[name], tensor
            elif isinstance(tensor, nn.Parameter):
                raise ValueError(f"parameter '{local_name}' ('{name}') is not in the family's weight table")


def partition(plan: TensorPlan, local: Tensor, rank: int, size: int) -> tuple[int, int]:
    """(rank, size) of the split of a local tensor: (0, 1) where the module keeps it whole. Transformer Engine holds
    MLA's down-projections whole on every rank, megatron-core's own layers split them. `ValueError` when the tensor has
    neither shape."""
    shape = logical_shape(local)
    if shape == plan.local_shape(1):
        return 0, 1
    if shape == plan.local_shape(size):
        return rank, size
    raise ValueError(
        f"parameter '{plan.name}' has the local shape {list(shape)}, the weight table says "
        f"{list(plan.local_shape(size))} on each of {size} ranks"
    )


class Exporter:
    """Knows once and for all which rank holds what; `hf_tensors()` can then be called at every refit. Collective over
    the pipeline group. `ValueError` when a tensor of the table is on no stage."""

    def __init__(
        self, chunks: Chunks, arch: Architecture, groups: Groups, plans: Iterable[TensorPlan] | None = None
    ) -> None:
        """`plans`: of the adapters, where they are to be exported; None: the model's, with the adapters merged."""
        self.arch, self.groups = arch, groups
        self.plans = registry.tensors(arch) if plans is None else tuple(plans)
        self.tensor, self.expert_tensor = position(groups.tensor), position(groups.expert_tensor)
        self.expert = position(groups.expert)
        self.stage, self.stages = position(groups.pipeline)
        self.device = next(chunks[0].parameters()).device
        rows = groupby(self.plans, key=lambda plan: (id(plan.mapping), plan.layer))
        self.slots = [Slot(list(plans)) for _, plans in rows]
        self._find_local(chunks)
        self._agree_on_owners()

    def _find_local(self, chunks: Chunks) -> None:
        plans = {plan.name: plan for plan in self.plans}
        found: dict[str, Tensor] = {}
        for plan, tensor in local_tensors(chunks, plans, self.arch, self.expert):
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

    @property
    def writer_of(self) -> int | None:
        """The pipeline stage whose tensors this rank, the first one of it, is to write; None on all others."""
        return self.stage if dist.get_rank() % (dist.get_world_size() // self.stages) == 0 else None

    def stage_of(self) -> dict[str, int]:
        """The pipeline stage that owns a tensor of the weight table."""
        return {name: slot.stage for slot in self.slots for plan in slot.plans for name in plan.hf}

    @property
    def held(self) -> Held:
        """What `Shares` is told of the trainer; pickled it has no weights."""
        return self.slots, self.plans, registry.layout(self.arch), self.groups.layout

    def shares(self, wanted: Sequence[Wanted], *, by_stage: bool = False) -> Shares:
        """What ranks want: rank r number r % len(wanted), or the first rank of each stage the stage's."""
        return Shares(*self.held, wanted, self.device, by_stage)

    @cached_property
    def _everywhere(self) -> Shares:
        return self.shares([{name: all_of(shape) for plan in self.plans for name, shape in plan.named_shapes()}])

    @cached_property
    def _at_writers(self) -> Shares:
        wanted: list[Wanted] = [{} for _ in range(self.stages)]
        for slot in self.slots:
            for plan in slot.plans:
                wanted[slot.stage] |= {name: all_of(shape) for name, shape in plan.named_shapes()}
        return self.shares(wanted, by_stage=True)

    def hf_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Collective: all tensors, whole, under the names that `transformers` and vLLM know, in the same order on
        every rank, a bucket at a time. Experts come one by one, but for families that only have them fused."""
        return self._everywhere.hf_tensors()

    def tensors(self, *, of_stage: bool = False) -> Iterator[tuple[str, Tensor]]:
        """As `hf_tensors`, of the table's names. `of_stage`: only to the first rank of each pipeline stage, the
        stage's."""
        return (self._at_writers if of_stage else self._everywhere).tensors()
