"""The training engine: this rank's share of the model, and a step over micro-batches under any layout."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_posttrain.checkpoint.hf import HfReader, model_directory
from megatron_posttrain.checkpoint.load import load_hf
from megatron_posttrain.config.schema import Config
from megatron_posttrain.data.batch import PackedBatch
from megatron_posttrain.errors import NotFiniteError
from megatron_posttrain.models.architecture import Architecture
from megatron_posttrain.models.build import FP8_TOKENS, build_model
from megatron_posttrain.models.head import output_rows
from megatron_posttrain.models.sharded import Exporter
from megatron_posttrain.parallel.context import gather_tokens, local_index
from megatron_posttrain.parallel.groups import Groups
from megatron_posttrain.platform import platform
from megatron_posttrain.training.finite import Recorder, anywhere, refuse
from megatron_posttrain.training.optimizer import make_optimizer, overlaps, wrap_for_data_parallel
from megatron_posttrain.training.timing import PhaseTimer
from megatron_posttrain.training.token_logprobs import token_logprobs


@dataclass(frozen=True)
class TokenOutput:
    """What the model says of a micro-batch's labels that count, in natural order whatever the layout; else 0.

    Log-probs are of softmax(logits / temperature), as the rollout engine samples.
    """

    logprobs: Tensor  # [t] fp32, differentiable
    entropy: Tensor  # [t] fp32, nats


Metrics = Mapping[str, float | Tensor]
# (output, batch) -> (this micro-batch's share of the step's loss, sums to add up over the global batch)
LossFunction = Callable[[TokenOutput, PackedBatch], tuple[Tensor, Metrics]]


@dataclass
class StepResult:
    loss: float
    grad_norm: float
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)  # forward_backward, optimizer


class Engine:
    """Model, optimizer and the forward-backward schedule of one rank.

    Args:
        train: also make gradient buffers and the optimizer.
    """

    def __init__(self, config: Config, arch: Architecture, groups: Groups, *, train: bool = True) -> None:
        self.config, self.arch, self.groups = config, arch, groups
        self._offloaded = False
        self.modules, self.model_config = build_model(arch, groups.layout, config.model, config.precision)
        if not config.model.random_init:
            load_hf(self.modules, arch, HfReader(model_directory(config.model.path)), groups)
        self.chunks: Sequence[Any] = self.modules
        self.optimizer: Any = None
        if train:
            with platform().megatron():
                self.chunks = wrap_for_data_parallel(self.modules, self.model_config, config)
                self.optimizer = make_optimizer(self.chunks, self.model_config, config)

    @property
    def row_multiple(self) -> int:
        """Tokens that a micro-batch is padded to a multiple of, so that FP8 kernels take every rank's share."""
        fp8, layout = self.config.precision.fp8, self.groups.layout
        if fp8 is None:
            return 1
        return FP8_TOKENS[fp8] * layout.context * layout.sequence_split

    def _padded(self, micro_batches: Sequence[PackedBatch]) -> list[PackedBatch]:
        return [batch.padded_to(self.row_multiple) for batch in micro_batches]

    @functools.cached_property
    def exporter(self) -> Exporter:
        """Whole tensors from the shards; made once, collectively, because it asks who owns what."""
        return Exporter(self.modules, self.arch, self.groups)

    def gather_weights(self) -> None:
        """Collective; before weights are read other than by a forward pass, to which overlap leaves the gathering
        of what the optimizer has written."""
        if self.optimizer is not None and overlaps(self.config):
            with platform().megatron():
                for chunk in self.chunks:
                    chunk.start_param_sync(force_sync=True)

    def offload(self) -> None:
        """Frees what only a training step needs: drops gradients, moves optimizer states to host memory. bf16 only:
        fp32 main weights are the weights themselves. The next step takes each back where it needs it; may be repeated.
        """
        with platform().megatron():
            for chunk in self.chunks:
                chunk.offload_grad_buffers()
            self.optimizer.offload_to_cpu()
        self._offloaded = True

    def _restore_optimizer(self) -> None:
        """After backward, so that states and activations are never on the device together."""
        if self._offloaded:
            platform().release_memory()  # what activations took is in blocks of other sizes
            self.optimizer.restore_from_cpu()
            self._offloaded = False

    # ---- a training step -------------------------------------------------------------------------------

    def train_step(
        self, micro_batches: Sequence[PackedBatch], loss_function: LossFunction, lr: float, temperature: float = 1.0
    ) -> StepResult:
        """Forward, backward and optimizer step. Every data parallel rank gives as many micro-batches.

        The losses of all micro-batches of all ranks are summed: `loss_function` divides by the global
        count, so the result does not depend on the layout. NotFiniteError, on all ranks and with the weights as
        they were, for a loss or gradient that is not finite.
        """
        micro_batches = self._padded(micro_batches)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_mult", 1.0)
        with platform().megatron():
            for chunk in self.chunks:
                chunk.train()
                if self._offloaded:
                    chunk.restore_grad_buffers()
                chunk.zero_grad_buffer()
            self.optimizer.zero_grad()
            timer = PhaseTimer()
            with timer("forward_backward"):
                outputs = self._schedule(micro_batches, loss_function, temperature, forward_only=False)
            totals = self._total(outputs)
            try:
                if anywhere(not math.isfinite(totals["loss"])):
                    raise NotFiniteError("the loss is not finite")
                with timer("optimizer"):
                    self._restore_optimizer()
                    _, grad_norm, _ = self.optimizer.step()
            except NotFiniteError as error:
                again = partial(self._again, micro_batches, loss_function, temperature)
                refuse(self, str(error), again, gradients=True)
        return StepResult(totals.pop("loss"), float(grad_norm), totals, timer.seconds)

    def _again(
        self,
        micro_batches: Sequence[PackedBatch],
        loss_function: LossFunction,
        temperature: float,
        recorder: Recorder,
    ) -> None:
        """The forward passes of a step, whose losses the recorder sees too."""

        def watched(output: TokenOutput, batch: PackedBatch) -> tuple[Tensor, Metrics]:
            loss, metrics = loss_function(output, batch)
            last = len(self.chunks) - 1
            recorder.look(output.logprobs, last, sys.maxsize, "the log-probs")
            recorder.look(loss, last, sys.maxsize, "the loss")
            return loss, metrics

        self._schedule(micro_batches, watched, temperature, forward_only=True)

    # ---- log-probabilities -----------------------------------------------------------------------------

    @torch.no_grad()
    def logprobs(self, micro_batches: Sequence[PackedBatch], temperature: float = 1.0) -> list[TokenOutput]:
        """Of every micro-batch, on every rank of the model's copy."""
        micro_batches = self._padded(micro_batches)
        kept: list[TokenOutput] = []

        def keep(output: TokenOutput, batch: PackedBatch) -> tuple[Tensor, Metrics]:
            kept.append(output)
            return output.logprobs.sum(), {}

        with platform().megatron():
            for chunk in self.chunks:
                chunk.eval()
            self._schedule(micro_batches, keep, temperature, forward_only=True)
        return self.from_last_stage(kept, micro_batches)

    def refuse_logprobs(self, micro_batches: Sequence[PackedBatch], temperature: float) -> None:
        """Collective: raises NotFiniteError that names the rank and layer which made log-probs that are not finite."""
        with platform().megatron():
            batches = self._padded(micro_batches)
            score = partial(self._again, batches, lambda output, _: (output.logprobs.sum(), {}), temperature)
            refuse(self, "log-probs are not finite", score)

    def from_last_stage(self, kept: list[TokenOutput], batches: Sequence[PackedBatch]) -> list[TokenOutput]:
        """Collective: the outputs of these micro-batches, which the last stage kept, on every stage."""
        group = self.groups.pipeline
        if group.size() == 1:
            return kept
        sizes = [len(b.tokens) for b in self._padded(batches)]
        if self.groups.last_stage:
            flat = torch.stack([torch.cat([o.logprobs for o in kept]), torch.cat([o.entropy for o in kept])])
        else:
            flat = torch.empty(2, sum(sizes), device=platform().device)
        dist.broadcast(flat, src=dist.get_global_rank(group, group.size() - 1), group=group)
        pairs = zip(flat[0].split(sizes), flat[1].split(sizes), strict=True)
        return [TokenOutput(logprobs, entropy) for logprobs, entropy in pairs]

    # ---- megatron-core's schedules ---------------------------------------------------------------------

    def _schedule(
        self, batches: Sequence[PackedBatch], loss_function: LossFunction, temperature: float, *, forward_only: bool
    ) -> list[dict[str, Tensor]]:
        from megatron.core.pipeline_parallel import get_forward_backward_func

        layout = self.groups.layout
        rows = max(len(b.tokens) for b in batches)
        iterators: list[Iterator[PackedBatch]] = [iter(batches) for _ in self.chunks]
        return get_forward_backward_func()(
            forward_step_func=partial(self._forward, loss_function, len(batches), temperature),
            data_iterator=iterators if layout.virtual_pipeline else iterators[0],
            model=list(self.chunks) if layout.virtual_pipeline else self.chunks[0],
            num_microbatches=len(batches),
            seq_length=rows,
            micro_batch_size=1,
            forward_only=forward_only,
        )

    def _forward(
        self, loss_function: LossFunction, count: int, temperature: float, batches: Iterator[PackedBatch], model: Any
    ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Metrics]]]:
        from megatron.core.packed_seq_params import PackedSeqParams

        context = self.groups.context
        batch = next(batches)
        device = platform().device
        mine = local_index(batch.cu_seqlens, context.rank(), context.size())
        tokens, positions, labels = (x[mine].to(device) for x in (batch.tokens, batch.position_ids, batch.labels))
        cu_seqlens = batch.cu_seqlens.to(device)
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=batch.max_seqlen,
            max_seqlen_kv=batch.max_seqlen,
        )
        counted = batch.loss_mask[mine].nonzero()[:, 0]
        rows = (counted if len(counted) else counted.new_zeros(1)).to(device)  # kernels need not take none
        with output_rows(model, rows):
            output = model(
                tokens[None],
                positions[None],
                None,
                packed_seq_params=packed,
                padding_mask=self._padding_mask(batch, mine, model),
            )
        return output, partial(self._loss, loss_function, count, temperature, batch, rows, labels)

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

    def _loss(
        self,
        loss_function: LossFunction,
        count: int,
        temperature: float,
        batch: PackedBatch,
        rows: Tensor,
        labels: Tensor,
        logits: Tensor,
    ) -> tuple[Tensor, Metrics]:
        found = token_logprobs(logits[0], labels[rows], self.arch.vocab_size, self.groups.tensor, temperature)
        everywhere = (x.new_zeros(len(labels)).index_copy(0, rows, x) for x in found)
        output = TokenOutput(*(gather_tokens(x, batch.cu_seqlens, self.groups.context) for x in everywhere))
        loss, metrics = loss_function(output, batch.to(platform().device))
        sums = {"loss": loss.detach().clone(), **metrics}
        # Undone later: the schedule multiplies by context ranks and divides by micro-batches, and the
        # gradient is averaged over data x context ranks. What is left is the sum over all of them.
        return loss * (count * self.groups.layout.data), sums

    def _total(self, outputs: list[dict[str, Tensor]]) -> dict[str, float]:
        """Sums over micro-batches and data parallel ranks, known to every rank."""
        group = self.groups.pipeline
        names = [sorted(outputs[0])] if outputs else [[]]
        if group.size() > 1:
            dist.broadcast_object_list(names, src=dist.get_global_rank(group, group.size() - 1), group=group)
        flat = torch.zeros(len(names[0]), dtype=torch.float64)
        for micro_batch in outputs:
            flat += torch.tensor([float(micro_batch[n]) for n in names[0]], dtype=torch.float64)
        flat = flat.to(platform().device)
        if self.groups.last_stage and self.groups.data.size() > 1:
            dist.all_reduce(flat, group=self.groups.data)
        if group.size() > 1:
            dist.broadcast(flat, src=dist.get_global_rank(group, group.size() - 1), group=group)
        return dict(zip(names[0], flat.tolist(), strict=True))
