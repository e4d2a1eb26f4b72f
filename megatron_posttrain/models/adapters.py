"""Adapters of a model's linear layers: which there are, their weight tables, and how a model gets them."""

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from megatron_posttrain.config.schema import LoraConfig
from megatron_posttrain.errors import UserError, nearest
from megatron_posttrain.models import registry
from megatron_posttrain.models.architecture import Architecture
from megatron_posttrain.models.disk_layout import Fusion
from megatron_posttrain.models.modules.lora import (
    LoraLinear,
    Split,
    add_to_grouped_output,
    add_to_logits,
    add_to_output,
)
from megatron_posttrain.models.modules.nf4 import BLOCK, quantising_linears, run_dequantised
from megatron_posttrain.models.sharded import GROUPED_EXPERT, local_tensors, naming, partition, position, unwrap
from megatron_posttrain.models.weights import GatedMLP, Mapping, Replicated, RowParallel, TensorPlan, Vocabulary, expand
from megatron_posttrain.parallel.groups import Groups
from megatron_posttrain.parallel.layout import Layout

ALL = "all-linear"
A, B, M = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"  # after the module's name, as PEFT has it
ROUTER = "mlp.router.weight"


@dataclass(frozen=True)
class Target:
    """A row of the family's weight table whose weight has an adapter, and the rows of its A, B and magnitudes.
    `owners`: by Hugging Face tensor of the weight the number of its A; -1: not adapted."""

    weight: Mapping
    owners: tuple[int, ...]
    a: Mapping
    b: Mapping
    m: Mapping | None


@dataclass(frozen=True)
class Adapters:
    """The adapters of a model."""

    lora: LoraConfig
    arch: Architecture
    fused: bool  # gate and up of experts share an A, as the tensor that holds both on disk has it
    targets: list[Target]

    @cached_property
    def weights(self) -> dict[str, TensorPlan]:
        """Plans of the adapted weights, by name."""
        return {plan.name: plan for plan in expand([t.weight for t in self.targets])}

    @cached_property
    def plans(self) -> dict[str, TensorPlan]:
        """Those of all A, B and magnitudes."""
        return {plan.name: plan for plan in expand([row for t in self.targets for row in (t.a, t.b, t.m) if row])}

    def target(self, plan: TensorPlan) -> Target:
        return next(t for t in self.targets if t.weight.megatron == plan.mapping.megatron)

    def modules(self) -> Iterator[tuple[str, str, str, str | None]]:
        """(module, its A, its B, its magnitudes): Hugging Face names, of every adapted linear layer."""
        for plan in self.weights.values():
            a = self.plans[adapter_name(plan.name, "a")].hf
            for name, owner in zip(plan.hf, self.target(plan).owners, strict=True):
                if owner >= 0:
                    module = name.removesuffix(".weight")
                    yield module, a[owner], module + B, module + M if self.lora.use_dora else None

    def names_in_both(self) -> set[str]:
        """Names of experts' linear layers that other adapted layers have too. PEFT 0.21.2 takes the latter for experts
        of transformers 4 (`_convert_peft_config_moe`) and gives them none."""
        names: tuple[set[str], set[str]] = set(), set()
        for module, *_ in self.modules():
            names[".experts." in module].add(module.rpartition(".")[2])
        return names[0] & names[1]


def adapter_name(weight: str, letter: str) -> str:
    """The table's name of the A, B or magnitudes (`letter`: a, b, m) of a weight."""
    return f"{weight.removesuffix('weight')}lora.{letter}"


def find_adapters(arch: Architecture, lora: LoraConfig, *, fused: bool = False) -> Adapters:
    """What `lora.targets` asks for. `fused`: the directory of the base holds experts in 3-D tensors. UserError for a
    target that no linear layer of the model is called by."""
    fusions = {part: f for f in registry.layout(arch, fused).fusions for part in f.parts}
    wanted = [lora.targets] if isinstance(lora.targets, str) else lora.targets
    rows = [row for row in registry.table(arch) if _is_linear(row) or _is_named(row)]
    unused, known = set(wanted) - {ALL}, set()
    targets = []
    for row in rows:
        hit = []
        for pattern in row.hf:
            names = _names(pattern, fusions.get(pattern))
            known |= {name.rpartition(".")[2] for name in names}
            matching = {w for w in wanted if any(n == w or n.endswith(f".{w}") for n in names)}
            unused -= matching
            hit.append(bool(matching) or (ALL in wanted and _is_linear(row)))
        if any(hit):
            targets.append(_target(row, hit, lora, shared=row.hf[0] in fusions))
    if unused:
        name = sorted(unused)[0]
        raise UserError(
            f"lora.targets: no linear layer of this model is called '{name}'{nearest(name, known)}; "
            f"allowed: {ALL}, {', '.join(sorted(known))}"
        )
    if lora.use_dora and (of_experts := next((t.weight.hf[0] for t in targets if t.weight.experts), None)):
        name = of_experts.removesuffix(".weight").rpartition(".")[2]
        raise UserError(
            f"lora.use_dora: {name} is a layer of experts, for which PEFT has no magnitudes; name others in "
            "lora.targets: [q_proj, k_proj, v_proj, o_proj]"
        )
    return Adapters(lora, arch, bool(fusions), targets)


def _is_linear(row: Mapping) -> bool:
    inside = row.megatron.startswith("decoder.") and ".linear_" in row.megatron
    return inside and row.megatron.endswith(".weight") and not isinstance(row, Replicated)


def _is_named(row: Mapping) -> bool:
    """Whether it is adapted where it is named: a router, or an output layer with a weight of its own."""
    return row.megatron.endswith(ROUTER) or (row.megatron == "output_layer.weight" and isinstance(row, Vocabulary))


def _names(pattern: str, fusion: Fusion | None) -> list[str]:
    """What a linear layer is called: by its module, with and without the expert's number, or by the fused tensor."""
    module = pattern.removesuffix(".weight")
    return [module, module.replace(".experts.*.", ".experts."), *([fusion.hf] if fusion else [])]


def _target(row: Mapping, hit: list[bool], lora: LoraConfig, shared: bool) -> Target:
    first = hit.index(True)
    number = [0 if shared else sum(hit[:source]) for source in range(len(hit))]
    owners = tuple(n if adapted else -1 for n, adapted in zip(number, hit, strict=True))
    of_a = [first] if shared else [source for source, adapted in enumerate(hit) if adapted]
    kind = RowParallel if isinstance(row, RowParallel) else Replicated
    names = [name.removesuffix(".weight") for name in row.hf]
    where: dict[str, Any] = {"layers": row.layers, "experts": row.experts, "hf_layer_offset": row.hf_layer_offset}
    shapes = tuple((lora.rank, row.shapes[source][1]) for source in of_a)
    a = kind(adapter_name(row.megatron, "a"), tuple(names[source] + A for source in of_a), shapes, **where)

    def outputs(letter: str, suffix: str, width: tuple[int, ...]) -> Mapping:
        changes: dict[str, Any] = {
            "megatron": adapter_name(row.megatron, letter),
            "hf": tuple(name + suffix for name in names),
            "shapes": tuple((shape[0], *width) for shape in row.shapes),
        }
        return Replicated(**changes, **where) if kind is RowParallel else replace(row, **changes, copies=(), dtype=None)

    return Target(row, owners, a, outputs("b", B, (lora.rank,)), outputs("m", M, ()) if lora.use_dora else None)


def check_quantization(arch: Architecture, layout: Layout) -> None:
    """UserError where blocks of NF4 would lie across rows or ranks."""
    for row in filter(_is_linear, registry.table(arch)):
        split = layout.expert_tensor if row.experts else layout.tensor
        size, columns = split if isinstance(row, RowParallel) else 1, row.shapes[0][1]
        if columns % (BLOCK * size):
            name = row.hf[0].removesuffix(".weight").rpartition(".")[2]
            key = f" x parallel.{'expert_tensor' if row.experts else 'tensor'}={size}" if size > 1 else ""
            raise UserError(
                f"lora.quantization=nf4: {name} has {columns} inputs, not divisible by blocks of {BLOCK}{key}"
            )


def building(lora: LoraConfig | None, *, random: bool) -> AbstractContextManager[None]:
    """For the time in which a model is built that is to have these adapters."""
    quantized = lora is not None and lora.quantization is not None
    return quantising_linears(random) if quantized else contextlib.nullcontext()


def attach(chunks: Sequence[nn.Module], adapters: Adapters, groups: Groups, *, seed: int) -> None:
    """Freezes the model and gives its linear layers adapters: A uniform in +-1 / sqrt(in), as PEFT draws it, B zero.
    The same whole adapter under every layout."""
    from megatron_posttrain.models.modules.experts import GroupedExperts

    lora = adapters.lora
    for chunk in chunks:
        model: Any = unwrap(chunk)
        table_name = naming(model, adapters.arch, position(groups.expert))
        model.requires_grad_(False)
        run_dequantised(model, (GroupedExperts,))
        if getattr(model, "pre_process", False):
            # Layers that are recomputed, and stages without an adapter, need something to differentiate by.
            model.embedding.register_forward_hook(_require_gradient)
        for local_name, weight in list(model.named_parameters()):
            plan = adapters.weights.get(table_name(local_name))
            if plan is None:
                continue
            owned = plan.expert is not None
            group = groups.expert_tensor if owned else groups.tensor
            rank, size = partition(plan, weight, *position(group))
            row = isinstance(plan.mapping, RowParallel)
            by: Any = "row" if row else "column" if size == group.size() else "whole"
            gathered = owned or local_name == "output_layer.weight"  # `output_rows` gathers before the output layer
            split = Split(by, group, groups.layout.sequence_parallel and not gathered, owned)
            b = adapters.plans[adapter_name(plan.name, "b")]
            numbers_of_a = adapters.target(plan).owners
            segments = b.mapping.segments(rank, size)
            owners = torch.cat([torch.full((stop - start,), numbers_of_a[n or 0]) for n, start, stop in segments])
            module = LoraLinear(weight, plan.local_shape(size)[1], owners.to(weight.device), lora, split)
            with torch.no_grad():
                drawn = partial(_initial, (lora.rank, plan.shapes[0][1]), seed)
                adapters.plans[adapter_name(plan.name, "a")].fill(module.a, drawn, rank, size)
            _register(model, local_name, module)
            weight.adapter = module


def seed_of(*parts: int | str) -> int:
    """A seed for what `parts` name, another one for anything else."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:6], "big")


def _initial(shape: tuple[int, int], seed: int, name: str) -> Tensor:
    """An A [rank, in] by its Hugging Face name: drawn, not stored."""
    generator = torch.Generator().manual_seed(seed_of(seed, name))
    return (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(shape[1])


def _register(model: Any, weight: str, module: LoraLinear) -> None:
    """As `lora` of the layer that has the weight; of a grouped layer as one of its adapters."""
    layer = model.get_submodule(weight.rpartition(".")[0])
    if weight.endswith(ROUTER):
        layer.lora = module
        add_to_logits(layer)
        return
    if (grouped := GROUPED_EXPERT.search(weight)) is None:
        layer.lora = module
        layer.register_forward_hook(add_to_output, prepend=True)  # before those that rearrange the output
        return
    if not hasattr(layer, "lora"):
        layer.lora = nn.ModuleDict()
        layer.register_forward_hook(add_to_grouped_output, prepend=True)
    layer.lora[grouped[3]] = module


def _layers(chunks: Sequence[nn.Module]) -> list[LoraLinear]:
    return [module for chunk in chunks for module in chunk.modules() if isinstance(module, LoraLinear)]


def begin(chunks: Sequence[nn.Module]) -> None:
    """Collective, once the model has its weights: adapters that change nothing."""
    for module in _layers(chunks):
        module.begin()


def _require_gradient(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() else output


@contextlib.contextmanager
def disabled(chunks: Sequence[nn.Module]) -> Iterator[None]:
    """Meanwhile the model is its base."""
    for module in _layers(chunks):
        module.enabled = False
    try:
        yield
    finally:
        for module in _layers(chunks):
            module.enabled = True


def finalizing_copies(finalize: Callable[..., None]) -> Callable[..., None]:
    """megatron-core's function that reduces a step's gradients, after which expert tensor ranks sum those of their
    copies of an expert's A or B. It sums those of dense layers, over tensor ranks; of experts it knows no copies."""

    def both(model: Sequence[nn.Module], *args: Any, **kwargs: Any) -> None:
        finalize(model, *args, **kwargs)
        found: dict[Any, list[Tensor]] = {}
        for parameter in (p for chunk in model for p in chunk.parameters()):
            if (group := getattr(parameter, "sum_gradients_over", None)) is not None:
                found.setdefault(group, []).append(parameter.main_grad)  # type: ignore[attr-defined]
        for group, gradients in found.items():
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            torch.distributed.all_reduce(flat, group=group)
            for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(summed.view_as(gradient))

    return both


def sharded(chunk: nn.Module, adapters: Adapters, groups: Groups) -> dict[str, Any]:
    """What checkpoints hold of a chunk whose adapters are trained: these alone, in megatron-core's distributed format,
    which any other layout can read, by their names in the chunk."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor
    from megatron.core.transformer.mlp import apply_swiglu_sharded_factory

    names = {id(parameter): name for name, parameter in unwrap(chunk).named_parameters()}
    found: dict[str, Any] = {}
    for plan, tensor in local_tensors([chunk], adapters.plans, adapters.arch, position(groups.expert)):
        owned = plan.expert is not None
        place = position(groups.expert_tensor if owned else groups.tensor)
        copy = (groups.expert_copies if owned else groups.copies).rank()
        rank, size = partition(plan, tensor, *place)
        offsets = [(plan.mapping.dim, rank, size)] if size > 1 else []
        replica = (0, 0 if size > 1 else place[0], copy)
        shard = ShardedTensor.from_rank_offsets(plan.name, tensor, *offsets, replica_id=replica)
        # A shard of gate and up is one of each, not a range of rows
        gated = isinstance(plan.mapping, GatedMLP) and size > 1
        found[names[id(tensor)]] = apply_swiglu_sharded_factory(shard, ()) if gated else shard
    return found
