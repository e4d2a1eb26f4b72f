"""Layouts to consider: parsing one, enumerating all that training accepts, and how layers fall on stages."""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache

from megatron_posttrain.errors import UserError, nearest
from megatron_posttrain.models.architecture import Architecture
from megatron_posttrain.models.layout_checks import problems
from megatron_posttrain.parallel.layout import LAYOUT_KEYS, Layout, batch_problem, stage_layers
from megatron_posttrain.planning.flops import window_of

MICRO_BATCHES = (1, 2, 4, 8)
FEWEST_TOKENS = 2048  # of a sequence on one context parallel rank: below, communication dominates


def expert_data(layout: Layout) -> int:
    """Replicas of an expert."""
    return layout.world_size // (layout.expert_tensor * layout.expert * layout.pipeline)


def make_layout(gpus: int, **sizes: int) -> Layout:
    """A layout on `gpus` ranks; virtual_pipeline=1 means none."""
    if sizes.get("virtual_pipeline") == 1:
        del sizes["virtual_pipeline"]
    return replace(Layout(world_size=gpus), **sizes)  # type: ignore[arg-type]


def parse_layout(text: str, gpus: int) -> Layout:
    """`tensor=2,expert=8` -> Layout; sizes left out are 1. Raises UserError."""
    sizes: dict[str, int] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, _, value = part.partition("=")
        if key not in LAYOUT_KEYS:
            raise UserError(f"--layout: no key '{key}'{nearest(key, LAYOUT_KEYS)} (one of {', '.join(LAYOUT_KEYS)})")
        if not value.isdigit() or int(value) < 1:
            raise UserError(f"--layout: {key}={value or '(nothing)'}: allowed are whole numbers of at least 1")
        sizes[key] = int(value)
    return make_layout(gpus, **sizes)


def depth_of(layout: Layout) -> Layout:
    """The pipeline alone, on which the spread of layers depends: what caches of it are keyed by."""
    return Layout(pipeline=layout.pipeline, virtual_pipeline=layout.virtual_pipeline)


@lru_cache(maxsize=4096)
def chunk_layers(depth: Layout, num_layers: int) -> tuple[range, ...]:
    """Numbers of the layers of each model chunk, see `stage_layers`."""
    ends = itertools.accumulate(stage_layers(depth, num_layers), initial=0)
    return tuple(range(a, b) for a, b in itertools.pairwise(ends))


@lru_cache(maxsize=64)
def layer_kinds(arch: Architecture) -> tuple[int, ...]:
    """For every layer the first one of its kind: with a dense MLP or experts, with or without a window."""
    first: dict[tuple[bool, int | None], int] = {}
    kinds = [(arch.is_moe_layer(layer), window_of(arch, layer)) for layer in range(arch.num_layers)]
    return tuple(first.setdefault(kind, layer) for layer, kind in enumerate(kinds))


@lru_cache(maxsize=4096)
def stage_kinds(arch: Architecture, depth: Layout) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Per stage, (a layer that stands for its kind, how many of the kind) pairs."""
    kinds, chunks = layer_kinds(arch), chunk_layers(depth, arch.num_layers)
    counts = [Counter(kinds[n] for chunk in chunks[s :: depth.pipeline] for n in chunk) for s in range(depth.pipeline)]
    return tuple(tuple(sorted(count.items())) for count in counts)


def enumerate_layouts(
    arch: Architecture,
    gpus: int,
    *,
    domain: int,
    global_batch: int,
    sequence_length: int,
    micro_batches: Sequence[int] = MICRO_BATCHES,
) -> Iterator[tuple[Layout, int]]:
    """(layout, micro batch size) pairs that training accepts on `gpus` GPUs. `domain`: GPUs that share NVLink; tensor
    parallelism stays inside, the rest may leave it."""
    powers = [1 << k for k in range(gpus.bit_length()) if gpus % (1 << k) == 0]
    moe = arch.moe
    experts = [1] if moe is None else [e for e in powers if moe.num_experts % e == 0]
    depths = [(p, v) for p in powers if p <= 64 for v in range(1, 13) if (p > 1 or v == 1)]
    contexts = [c for c in powers if c == 1 or sequence_length // c >= FEWEST_TOKENS]
    tensors = [t for t in powers if t <= min(domain, 16)]
    for tensor, (pipeline, virtual), context, expert in itertools.product(tensors, depths, contexts, experts):
        layout = make_layout(
            gpus, tensor=tensor, pipeline=pipeline, virtual_pipeline=virtual, context=context, expert=expert
        )
        if next(problems(layout, arch), None) is not None:
            continue
        for micro_batch in micro_batches:
            if batch_problem(layout, global_batch, micro_batch) is None:
                yield layout, micro_batch
