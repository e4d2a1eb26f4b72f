"""One micro-batch through a rank's chunk of the model, for megatron-core's schedules."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from megatron_posttrain.data.batch import PackedBatch
from megatron_posttrain.models.architecture import Architecture
from megatron_posttrain.models.head import output_rows
from megatron_posttrain.parallel.context import gather_tokens, local_index
from megatron_posttrain.parallel.groups import Groups
from megatron_posttrain.platform import platform
from megatron_posttrain.training.heads import Head, Output, Rows
from megatron_posttrain.training.totals import Mean

Metrics = Mapping[str, Mean]
# A term of the loss for every token, sequence or unit of the micro-batch, never their sum or mean; what is logged, as
# sums that know their counts
Terms = tuple[Tensor, Metrics]
LossFunction = Callable[[Output, PackedBatch], Terms]
Loss = tuple[Tensor, dict[str, Any]]  # of a micro-batch, and what is logged
# (chunk of the model, batch, this context rank's positions in it) -> what a forward pass is in
Around = Callable[[Any, PackedBatch, Tensor], AbstractContextManager[None]]


@dataclass(frozen=True)
class ForwardStep:
    """What is done with every micro-batch. The loss is the sum of its terms over `denominator`."""

    arch: Architecture
    groups: Groups
    head: Head
    loss_function: LossFunction
    denominator: float
    around: Around | None

    def __call__(
        self, count: int, batches: Iterator[PackedBatch], model: Any
    ) -> tuple[Tensor, Callable[[Tensor], Loss]]:
        """The model's output for the next of `count` micro-batches, and what makes its loss of it."""
        from megatron.core.packed_seq_params import PackedSeqParams

        context = self.groups.context
        batch = next(batches)
        device = platform().device
        mine = local_index(batch.cu_seqlens, context.rank(), context.size())
        tokens, positions, labels = (x[mine].to(device) for x in (batch.tokens, batch.position_ids, batch.labels))
        bounds, longest = batch.cu_seqlens.to(device), batch.max_seqlen
        packed = PackedSeqParams(
            qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=longest, max_seqlen_kv=longest
        )
        chosen = self.head.positions(batch)[mine].nonzero()[:, 0]
        chosen = chosen if len(chosen) else chosen.new_zeros(1)  # kernels need not take none
        local = chosen.to(device)
        around = nullcontext() if self.around is None else self.around(model, batch, mine)
        with output_rows(model, local), around:
            mask = self._padding_mask(batch, mine, model)
            output = model(tokens[None], positions[None], None, packed_seq_params=packed, padding_mask=mask)
        rows = Rows(batch, mine[chosen], labels[local], self.arch.vocab_size, self.groups.tensor)
        return output, partial(self._loss, count, rows, local, len(mine))

    def _padding_mask(self, batch: PackedBatch, mine: Any, model: Any) -> Tensor | None:
        """[1, t] True at padding, which the routers' balancing loss must not count; None without any."""
        if self.arch.moe is None or not batch.has_padding:
            return None
        mask = batch.padding[mine].to(platform().device)
        layout = self.groups.layout
        first = getattr(model, "module", model).pre_process
        if layout.sequence_parallel and not first:
            # The first stage's model splits the mask over tensor ranks itself, later stages expect it split.
            mask = mask.chunk(layout.tensor)[self.groups.tensor.rank()]
        return mask[None]

    def _loss(self, count: int, rows: Rows, local: Tensor, tokens: int, logits: Tensor) -> Loss:
        batch, context = rows.batch, self.groups.context
        found = self.head(logits[0], rows)
        everywhere = {name: x.new_zeros(tokens, *x.shape[1:]).index_copy(0, local, x) for name, x in found.items()}
        output = {name: gather_tokens(x, batch.cu_seqlens, context) for name, x in everywhere.items()}
        terms, metrics = self.loss_function(output, batch.to(platform().device))
        if terms.dim() == 0:
            raise TypeError("a loss returns a term for every token, sequence or unit; found their sum or mean")
        loss = terms.sum() / self.denominator
        # Undone later: the schedule multiplies by context ranks and divides by micro-batches, and the
        # gradient is averaged over data x context ranks. What is left is the sum over all of them.
        return loss * (count * self.groups.layout.data), {"loss": loss.detach().clone(), **metrics}
