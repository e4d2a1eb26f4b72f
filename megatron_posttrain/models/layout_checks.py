"""Which parallel layouts are possible for a model, and the nearest ones that are."""

import itertools
from collections.abc import Iterator
from dataclasses import replace

from megatron_posttrain.errors import UserError
from megatron_posttrain.models.architecture import Architecture
from megatron_posttrain.parallel.layout import Layout


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


def check_layout(layout: Layout, arch: Architecture | None) -> Layout:
    """`layout` itself. Raises UserError with every reason against it and the nearest layouts that work."""
    found = list(problems(layout, arch))
    if not found:
        return layout
    works = nearest_layouts(layout, arch)
    advice = "; ".join(str(other) for other in works) or "none with this number of ranks"
    raise UserError(f"parallel: {'; '.join(found)}. Nearest layouts that work on {layout.world_size} ranks: {advice}")


def nearest_layouts(layout: Layout, arch: Architecture | None) -> list[Layout]:
    """Three valid layouts on the same ranks, fewest and smallest changes first."""
    sizes = [n for n in range(1, layout.world_size + 1) if layout.world_size % n == 0]
    experts = sizes if arch is None or arch.moe is not None else [1]
    virtual = dict.fromkeys((layout.virtual_pipeline, None))
    found: list[tuple[float, int, Layout]] = []
    for t, p, vp, c, e, et in itertools.product(sizes, sizes, virtual, sizes, experts, experts):
        other = replace(layout, tensor=t, pipeline=p, virtual_pipeline=vp, context=c, expert=e, expert_tensor=et)
        if next(problems(other, arch), None) is None:
            pairs = zip(layout.sizes.values(), other.sizes.values(), strict=True)
            distance = sum((x != y) + max(x, y) / min(x, y) for x, y in pairs)
            found.append((distance, len(found), other))
    return [other for _, _, other in sorted(found)[:3]]
