"""The training engine: this rank's share of the model, and a step over micro-batches under any layout."""

import functools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_posttrain.checkpoint.hf import HfReader, model_directory
from megatron_posttrain.checkpoint.load import experts_are_fused, load_hf
from megatron_posttrain.config.schema import Config, LoraConfig, ModelConfig, OptimizerConfig, PrecisionConfig
from megatron_posttrain.data.batch import PackedBatch
from megatron_posttrain.errors import NotFiniteError
from megatron_posttrain.models import adapters
from megatron_posttrain.models.architecture import Architecture
from megatron_posttrain.models.build import FP8_TOKENS, build_model
from megatron_posttrain.models.sharded import Exporter
from megatron_posttrain.parallel.groups import Groups
from megatron_posttrain.platform import platform
from megatron_posttrain.training.finite import Recorder, anywhere, refuse
from megatron_posttrain.training.forward import Around, ForwardStep, LossFunction, Terms
from megatron_posttrain.training.heads import Head, LabelLogprobs, Output
from megatron_posttrain.training.optimizer import (
    forget_moments,
    make_optimizer,
    overlaps,
    set_learning_rate,
    wrap_for_data_parallel,
)
from megatron_posttrain.training.process import say
from megatron_posttrain.training.timing import PhaseTimer
from megatron_posttrain.training.totals import Mean, Totals
from megatron_posttrain.training.weight_sets import WeightSets, average_used, update_average

LABEL_LOGPROBS = LabelLogprobs()
Batches = Sequence[PackedBatch]


@dataclass
class StepResult:
    """Of the global batch, the same on every rank; `outputs`: of this rank's micro-batches, where they were asked for,
    on the last pipeline stage."""

    loss: float
    grad_norm: float
    totals: Totals
    metrics: dict[str, Mean] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)  # forward_backward, optimizer
    outputs: list[Output] = field(default_factory=list)

    def figures(self) -> dict[str, float | Mean]:
        """By the names under which they are logged."""
        seconds = {f"{phase}_seconds": value for phase, value in self.seconds.items()}
        return {"loss": self.loss, "grad_norm": self.grad_norm, **seconds, **self.metrics}


class Engine:
    """A model, its optimizer if it is trained, and the forward-backward schedule of one rank.

    `optimizer` None: a frozen model, without gradient buffers or optimizer states. `overlap`: data parallel
    communication during forward and backward; None: on CUDA. `seed`: of adapters' first weights and dropout.
    """

    def __init__(
        self, arch: Architecture, groups: Groups, model: ModelConfig, precision: PrecisionConfig,
        optimizer: OptimizerConfig | None = None, *,
        overlap: bool | None = None, lora: LoraConfig | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        self.arch, self.groups, self.precision, self.optimizer_config = arch, groups, precision, optimizer
        self.overlap = optimizer is not None and overlaps(overlap)
        self._offloaded = False
        with adapters.building(lora, random=model.random_init):
            self.modules, self.model_config = build_model(arch, groups.layout, model, precision)
        self.adapters: adapters.Adapters | None = None
        self._seed, self._step, self._calls = seed, 0, 0
        self.ema: float | None = None  # decay of the average that is the weight set `ema`
        self.may_skip, self.skipped = 0, 0  # steps in a row that are not finite
        self.around: Around | None = None  # of forward passes, such as `routing`'s
        if lora is not None:
            self.adapters = adapters.find_adapters(arch, lora, fused=experts_are_fused(model, arch))
            with platform().megatron():
                adapters.attach(self.modules, self.adapters, groups, seed=seed)
        if not model.random_init:
            load_hf(self.modules, arch, HfReader(model_directory(model.path)), groups)
        adapters.begin(self.modules)
        self.chunks: Sequence[Any] = self.modules
        self.optimizer: Any = None
        if optimizer is None:
            for module in self.modules:
                module.requires_grad_(False)
            return
        with platform().megatron():
            self.chunks = wrap_for_data_parallel(self.modules, self.model_config, overlap=self.overlap)
            self.optimizer = make_optimizer(self.chunks, self.model_config, optimizer, overlap=self.overlap)
        if lora is not None:
            finalize = self.model_config.finalize_model_grads_func
            self.model_config.finalize_model_grads_func = adapters.finalizing_copies(finalize)

    @classmethod
    def of(cls, config: Config, arch: Architecture, groups: Groups, *, train: bool = True) -> Self:
        """As a whole config says."""
        optimizer = config.optimizer if train else None
        beside: Any = {"overlap": config.parallel.overlap, "lora": config.lora, "seed": config.training.seed}
        engine = cls(arch, groups, config.model, config.precision, optimizer, **beside)
        engine.ema, engine.may_skip = config.training.ema, config.training.skip_not_finite
        return engine

    @property
    def row_multiple(self) -> int:
        """Tokens that a micro-batch is padded to a multiple of, so that FP8 kernels take every rank's share."""
        fp8, layout = self.precision.fp8, self.groups.layout
        return 1 if fp8 is None else FP8_TOKENS[fp8] * layout.context * layout.sequence_split

    def _padded(self, micro_batches: Batches) -> list[PackedBatch]:
        return [batch.padded_to(self.row_multiple) for batch in micro_batches]

    # ---- weights ---------------------------------------------------------------------------------------

    @functools.cached_property
    def exporter(self) -> Exporter:
        """Whole tensors from the shards; made once, collectively, because it asks who owns what."""
        return Exporter(self.modules, self.arch, self.groups)

    @functools.cached_property
    def adapter_exporter(self) -> Exporter:
        """As `exporter`, of the adapters' tensors."""
        assert self.adapters is not None
        return Exporter(self.modules, self.arch, self.groups, self.adapters.plans.values())

    @functools.cached_property
    def weight_sets(self) -> WeightSets:
        """Of what is trained, where the rest is frozen beside adapters."""
        return WeightSets(self.modules, trained_only=self.adapters is not None)

    def gather_weights(self) -> None:
        """Collective; before weights are read other than by a forward pass, to which overlap leaves the gathering
        of what the optimizer has written."""
        if self.overlap:
            self._gather()

    def _gather(self) -> None:
        with platform().megatron():
            for chunk in self.chunks:
                chunk.start_param_sync(force_sync=True)

    def keep_weights(self, name: str) -> None:
        """Collective: a copy of the present weights in host memory, such as `reference`."""
        self.gather_weights()
        self.weight_sets.keep(name)

    @contextmanager
    def weights(self, name: str) -> Iterator[None]:
        """Collective: meanwhile forward passes are of the weights that were kept under `name`, of their moving average
        (`ema`), or, where adapters are trained and it is `base`, of the model without them."""
        self.gather_weights()
        if name == "ema" and self.ema is not None:
            scope = average_used(self.optimizer, self._gather)
        elif name == "base" and self.adapters is not None:
            scope = adapters.disabled(self.modules)
        else:
            scope = self.weight_sets.use(name)
        with scope:
            yield

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

    def reset_optimizer(self) -> None:
        """Its moments begin anew; its learning rate stays the schedule's."""
        self._restore_optimizer()
        forget_moments(self.optimizer)

    # ---- a training step -------------------------------------------------------------------------------

    def begin_step(self, index: int) -> None:
        """A run's step number `index` (from 0), from which the masks of dropout follow."""
        self._step, self._calls = index, 0

    def _seed_dropout(self) -> None:
        """The same on all tensor ranks, which need the same masks, and in every attempt at this step."""
        if self.adapters is not None and self.adapters.lora.dropout:
            from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

            place = self.groups.data.rank(), self.groups.context.rank()
            seed = adapters.seed_of(self._seed, self._step, self._calls, *place)
            torch.manual_seed(seed)
            # Under sequence parallelism layers run in megatron-core's own state, which on CPU is that of torch
            model_parallel_cuda_manual_seed(seed)
        self._calls += 1

    def train_step(
        self, micro_batches: Batches, loss_function: LossFunction, over: Callable[[Totals], float], lr: float,
        head: Head = LABEL_LOGPROBS, *, keep: bool = False,
    ) -> StepResult:  # fmt: skip
        """Forward, backward and optimizer step. Every data parallel rank gives as many micro-batches.

        The loss is the sum of `loss_function`'s terms over all micro-batches of all ranks, divided by `over` the
        global batch's totals, so that it does not depend on the layout. `keep`: also returns what the head computed.

        Raises NotFiniteError, on all ranks and with the weights as they were, for a loss or gradient that is not
        finite, unless it may be skipped (then `skipped` is 1 and weights and optimizer are as they were); TypeError for
        a loss that is reduced already.
        """
        micro_batches = self._padded(micro_batches)
        totals = Totals.of(micro_batches, self.groups.data)
        outputs: list[Output] = []
        loss_function = partial(_kept, loss_function, outputs) if keep else loss_function
        work = self._work(head, loss_function, float(over(totals)))
        assert self.optimizer_config is not None
        set_learning_rate(self.optimizer, self.optimizer_config, lr)
        with platform().megatron():
            self._ready_to_train()
            self._seed_dropout()
            timer = PhaseTimer()
            with timer("forward_backward"):
                found = self._schedule(micro_batches, work, forward_only=False)
            loss, metrics = self._total(found)
            try:
                if anywhere(not math.isfinite(loss)):
                    raise NotFiniteError("the loss is not finite")
                with timer("optimizer"):
                    self._restore_optimizer()
                    _, grad_norm, _ = self.optimizer.step()
                    self.skipped = 0
                    if self.ema is not None:
                        update_average(self.optimizer, self.ema)
            except NotFiniteError as error:
                grad_norm = math.nan
                self._skip(str(error), partial(self._again, micro_batches, work))
        if self.may_skip:
            metrics["skipped"] = Mean(min(self.skipped, 1), 1)
        return StepResult(loss, float(grad_norm), totals, metrics, timer.seconds, outputs)

    def _skip(self, what: str, forward: Callable[[Recorder], Any]) -> None:
        """Collective: says where it was first seen; raises it where one more step in a row may not be skipped. A run's
        first step is never: a model that begins so does not get better."""
        try:
            refuse(self, what, forward, gradients=True)
        except NotFiniteError as error:
            if self._step == 0 or self.skipped >= self.may_skip:
                raise
            self.skipped += 1
            count = f"{self.skipped} in a row, training.skip_not_finite={self.may_skip}"
            say(f"warning: step {self._step + 1} is skipped ({count}): {error}")

    def _ready_to_train(self) -> None:
        for chunk in self.chunks:
            chunk.train()
            if self._offloaded:
                chunk.restore_grad_buffers()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def _work(self, head: Head, loss_function: LossFunction, denominator: float = 1.0) -> ForwardStep:
        return ForwardStep(self.arch, self.groups, head, loss_function, denominator, self.around)

    def _again(self, micro_batches: Batches, work: ForwardStep, recorder: Recorder) -> None:
        """The forward passes of a step, whose outputs and losses the recorder sees too."""

        def watched(output: Output, batch: PackedBatch) -> Terms:
            terms, metrics = work.loss_function(output, batch)
            last = len(self.chunks) - 1
            recorder.look(list(output.values()), last, sys.maxsize, "the log-probs")
            recorder.look(terms, last, sys.maxsize, "the loss")
            return terms, metrics

        self._schedule(micro_batches, replace(work, loss_function=watched), forward_only=True)

    # ---- forward passes --------------------------------------------------------------------------------

    @torch.no_grad()
    def forward(self, micro_batches: Batches, head: Head = LABEL_LOGPROBS) -> list[Output]:
        """What the head computes of every micro-batch, on every rank of the model's copy."""
        micro_batches = self._padded(micro_batches)
        kept: list[Output] = []
        with platform().megatron():
            for chunk in self.chunks:
                chunk.eval()
            self._schedule(micro_batches, self._work(head, partial(_kept, _no_loss, kept)), forward_only=True)
        return self.from_last_stage(kept, micro_batches, head)

    def refuse_outputs(self, micro_batches: Batches, head: Head) -> None:
        """Collective: raises NotFiniteError that names the rank and layer which made an output that is not finite."""
        with platform().megatron():
            work = self._work(head, _no_loss)
            refuse(self, "log-probs are not finite", partial(self._again, self._padded(micro_batches), work))

    def from_last_stage(self, kept: list[Output], batches: Batches, head: Head) -> list[Output]:
        """Collective: the outputs of these micro-batches, which the last stage kept, on every stage."""
        group = self.groups.pipeline
        if group.size() == 1:
            return kept
        sizes = [len(batch.tokens) for batch in self._padded(batches)]
        found: list[dict[str, Tensor]] = [{} for _ in sizes]
        for name, width in head.widths.items():
            if self.groups.last_stage:
                whole = torch.cat([output[name] for output in kept])
            else:
                whole = torch.empty(sum(sizes), *([width] if width else []), device=platform().device)
            dist.broadcast(whole, src=dist.get_global_rank(group, group.size() - 1), group=group)
            for output, part in zip(found, whole.split(sizes), strict=True):
                output[name] = part
        return list(found)

    # ---- megatron-core's schedules ---------------------------------------------------------------------

    def _schedule(self, batches: Batches, work: ForwardStep, *, forward_only: bool) -> list[dict[str, Any]]:
        from megatron.core.pipeline_parallel import get_forward_backward_func

        virtual, iterators = self.groups.layout.virtual_pipeline, [iter(batches) for _ in self.chunks]
        return get_forward_backward_func()(
            forward_step_func=partial(work, len(batches)),
            data_iterator=iterators if virtual else iterators[0],
            model=list(self.chunks) if virtual else self.chunks[0],
            num_microbatches=len(batches),
            seq_length=max(len(batch.tokens) for batch in batches),
            micro_batch_size=1,
            forward_only=forward_only,
        )

    def _total(self, outputs: list[dict[str, Any]]) -> tuple[float, dict[str, Mean]]:
        """Sums over micro-batches and data parallel ranks, known to every rank: the loss, and what is logged."""
        group = self.groups.pipeline
        names = [sorted(outputs[0].keys() - {"loss"})] if outputs else [[]]
        if group.size() > 1:
            dist.broadcast_object_list(names, src=dist.get_global_rank(group, group.size() - 1), group=group)
        flat = torch.zeros(1 + 2 * len(names[0]), dtype=torch.float64)
        for found in outputs:
            pairs = [part for name in names[0] for part in (found[name].total, found[name].count)]
            flat += torch.tensor([float(part) for part in (found["loss"], *pairs)], dtype=torch.float64)
        flat = flat.to(platform().device)
        if self.groups.last_stage and self.groups.data.size() > 1:
            dist.all_reduce(flat, group=self.groups.data)
        if group.size() > 1:
            dist.broadcast(flat, src=dist.get_global_rank(group, group.size() - 1), group=group)
        loss, *sums = flat.tolist()
        return loss, {name: Mean(*sums[2 * i : 2 * i + 2]) for i, name in enumerate(names[0])}


def _kept(loss_function: LossFunction, outputs: list[Output], output: Output, batch: PackedBatch) -> Terms:
    outputs.append({name: values.detach() for name, values in output.items()})
    return loss_function(output, batch)


def _no_loss(output: Output, batch: PackedBatch) -> Terms:
    return next(iter(output.values())), {}
