"""A parallel layout: which products of ranks are possible for a model, and the nearest ones that are."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_posttrain.config.schema import ParallelConfig
from megatron_posttrain.errors import UserError
from megatron_posttrain.models.architecture import Architecture

LAYOUT_KEYS = ("tensor", "pipeline", "virtual_pipeline", "context", "expert", "expert_tensor")


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel dimensions of `world_size` ranks; `data` follows from the others."""

    world_size: int = 1
    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int | None = None
    context: int = 1
    expert: int = 1
    expert_tensor: int = 1
    sequence: bool = True

    @classmethod
    def from_config(cls, parallel: ParallelConfig, world_size: int) -> Layout:
        return cls(world_size=world_size, **parallel.model_dump(exclude={"overlap"}))

    @property
    def model(self) -> int:
        """Ranks that share one copy of the dense weights and one batch row."""
        return self.tensor * self.pipeline * self.context

    @property
    def data(self) -> int:
        return self.world_size // self.model

    @property
    def chunks(self) -> int:
        """Model chunks of a rank."""
        return self.virtual_pipeline or 1

    @property
    def sequence_parallel(self) -> bool:
        return self.sequence and self.tensor > 1

    @property
    def sequence_split(self) -> int:
        """Ranks that share a sequence's tokens outside of attention and MLP, context ranks apart."""
        return self.tensor if self.sequence_parallel else 1

    @property
    def sequence_multiple(self) -> int:
        """Every sequence is padded to this many tokens: two chunks a context rank, whole ones a tensor rank."""
        return (2 * self.context if self.context > 1 else 1) * self.sequence_split

    @property
    def micro_batch_multiple(self) -> int:
        """Micro-batches of a step, over all ranks, come in multiples of this."""
        return self.data * (self.pipeline if self.virtual_pipeline else 1)

    @property
    def sizes(self) -> dict[str, int]:
        """By name, 1 where nothing is split."""
        return {key: getattr(self, key) or 1 for key in LAYOUT_KEYS}

    def __str__(self) -> str:
        parts = [f"{key}={size}" for key, size in self.sizes.items() if size > 1]
        return " ".join([*parts, f"data={max(self.data, 1)}"])


def stage_layers(layout: Layout, num_layers: int) -> list[int]:
    """Layers of each model chunk, in the order of the model; chunk c is on stage c % pipeline.

    As even as possible. What is left over goes to the middle first, then to the chunk with the embedding, and
    never to the one with the output head, whose logits cost most. These two may have no layer at all.
    """
    chunks = layout.pipeline * layout.chunks
    size, extra = divmod(num_layers, chunks)
    larger = [*range(1, chunks - 1), 0][:extra]
    return [size + (chunk in larger) for chunk in range(chunks)]


def problems(layout: Layout, arch: Architecture | None) -> Iterator[str]:
    """Why `layout` cannot run, one reason each; nothing when it can. `arch` None checks the ranks only."""
    if layout.world_size % layout.model:
        yield (
            f"{layout.world_size} ranks are not divisible by tensor x pipeline x context = "
            f"{layout.tensor} x {layout.pipeline} x {layout.context} = {layout.model}"
        )
    experts = layout.expert * layout.expert_tensor * layout.pipeline
    if layout.world_size % experts:
        yield (
            f"{layout.world_size} ranks are not divisible by expert x expert_tensor x pipeline = "
            f"{layout.expert} x {layout.expert_tensor} x {layout.pipeline} = {experts}"
        )
    if layout.virtual_pipeline is not None and layout.pipeline == 1:
        yield "virtual_pipeline needs pipeline of 2 or more"
    if arch is not None:
        yield from _model_problems(layout, arch)


def _model_problems(layout: Layout, arch: Architecture) -> Iterator[str]:
    t = layout.tensor
    if arch.num_heads % t:
        yield f"{arch.num_heads} attention heads are not divisible by tensor={t}"
    if arch.mla is None and arch.num_query_groups % t:
        yield f"{arch.num_query_groups} key-value heads are not divisible by tensor={t}"
    if arch.ffn_size % t:
        yield f"the MLP width {arch.ffn_size} is not divisible by tensor={t}"
    chunks = layout.pipeline * layout.chunks
    if arch.num_layers < chunks - 2:
        yield (
            f"{arch.num_layers} layers do not fill pipeline x virtual_pipeline = {chunks} chunks, "
            "of which the first and the last may be empty"
        )
    moe = arch.moe
    if moe is None:
        if layout.expert > 1 or layout.expert_tensor > 1:
            yield "the model has no experts, so expert and expert_tensor must be 1"
        return
    if moe.num_experts % layout.expert:
        yield f"{moe.num_experts} experts are not divisible by expert={layout.expert}"
    if moe.expert_ffn_size % layout.expert_tensor:
        yield f"the expert width {moe.expert_ffn_size} is not divisible by expert_tensor={layout.expert_tensor}"
    if arch.mlp_bias and layout.expert_tensor > 1:
        yield "megatron-core splits no experts with biases, so expert_tensor must be 1"
    if moe.shared_ffn_size % t:
        yield f"the shared expert width {moe.shared_ffn_size} is not divisible by tensor={t}"
    if t > 1 and not layout.sequence:
        yield "experts with tensor > 1 need sequence parallelism (parallel.sequence=true)"


def batch_problem(layout: Layout, global_batch: int, micro_batch: int) -> str | None:
    """Why the batch cannot be cut into micro-batches of the layout's replicas; None where it can."""
    rows = micro_batch * layout.data
    count, rest = divmod(global_batch, rows)
    if rest:
        sizes = " or ".join(str(n * rows) for n in (count, count + 1) if n)
        return (
            f"a global batch of {global_batch} is not a multiple of micro batch size x data parallel ranks = "
            f"{micro_batch} x {layout.data}; nearest: {sizes}"
        )
    if layout.virtual_pipeline and count % layout.pipeline:
        return f"an interleaved pipeline needs a multiple of pipeline={layout.pipeline} micro-batches, found {count}"
    return None


def check_layout(layout: Layout, arch: Architecture | None) -> Layout:
    """`layout` itself. Raises UserError with every reason against it and the nearest layouts that work."""
    found = list(problems(layout, arch))
    if not found:
        return layout
    works = nearest_layouts(layout, arch)
    advice = "; ".join(str(other) for other in works) or "none with this number of ranks"
    raise UserError(f"parallel: {'; '.join(found)}. Nearest layouts that work on {layout.world_size} ranks: {advice}")


def nearest_layouts(layout: Layout, arch: Architecture | None, count: int = 3) -> list[Layout]:
    """Valid layouts on the same ranks, fewest and smallest changes first."""
    sizes = [n for n in range(1, layout.world_size + 1) if layout.world_size % n == 0]
    experts = sizes if arch is None or arch.moe is not None else [1]
    virtual = dict.fromkeys((layout.virtual_pipeline, None))
    found: list[tuple[float, int, Layout]] = []
    for t, p, vp, c, e, et in itertools.product(sizes, sizes, virtual, sizes, experts, experts):
        other = replace(layout, tensor=t, pipeline=p, virtual_pipeline=vp, context=c, expert=e, expert_tensor=et)
        if next(problems(other, arch), None) is None:
            found.append((_distance(layout, other), len(found), other))
    return [other for _, _, other in sorted(found)[:count]]


def _distance(a: Layout, b: Layout) -> float:
    pairs = zip(a.sizes.values(), b.sizes.values(), strict=True)
    return sum((x != y) + max(x, y) / min(x, y) for x, y in pairs)
