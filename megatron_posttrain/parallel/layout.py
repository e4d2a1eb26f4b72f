"""A parallel layout: sizes of the parallel dimensions, and what follows from them."""

from dataclasses import dataclass
from typing import Self

from megatron_posttrain.config.schema import ParallelConfig

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
    def from_config(cls, parallel: ParallelConfig, world_size: int) -> Self:
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
    """Layers of each model chunk, in the order of the model; chunk c is on stage c % pipeline. As even as possible.
    What is left over goes to the middle first, then to the chunk with the embedding, and never to the one with the
    output head, whose logits cost most. These two may have no layer at all."""
    chunks = layout.pipeline * layout.chunks
    size, extra = divmod(num_layers, chunks)
    larger = [*range(1, chunks - 1), 0][:extra]
    return [size + (chunk in larger) for chunk in range(chunks)]


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
