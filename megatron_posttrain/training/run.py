"""A run: the loop over steps that every algorithm shares."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from megatron_posttrain.errors import NotFiniteError, UserError
from megatron_posttrain.output import write_whole
from megatron_posttrain.parallel.groups import make_groups, start_distributed
from megatron_posttrain.training.checkpoints import Checkpoints
from megatron_posttrain.training.engine import Engine
from megatron_posttrain.training.export import export_run
from megatron_posttrain.training.prepare import Prepared
from megatron_posttrain.training.process import say
from megatron_posttrain.training.record import Record
from megatron_posttrain.training.resume import Origin
from megatron_posttrain.training.routing import ExpertLoad
from megatron_posttrain.training.schedule import learning_rate, total_steps
from megatron_posttrain.training.timing import PhaseTimer
from megatron_posttrain.training.totals import Mean

REQUEUE_STATUS = 75  # EX_TEMPFAIL: stopped on request, a checkpoint is saved, run the same command again

Listener = Callable[[int, Mapping[str, float]], None]  # (number of the step from 1, what was logged)
_listeners: list[Listener] = []
Closing = TypeVar("Closing")


class Dataset(Protocol):
    """What steps take their rows from."""

    @property
    def fingerprint(self) -> str: ...

    @property
    def message(self) -> str: ...

    def steps_per_epoch(self, batch_size: int, epochs: float = 1.0) -> int: ...


class Run:
    """Builds the model, resumes, times, logs, saves, stops on request, exports; the algorithm is the loop's body.

        with Run(prepared, dataset) as run:
            engine = run.model()
            for step in run.steps():
                with step.phase("train"):
                    result = engine.train_step(...)
                step.log(result.figures())
        return run.status

    Raises UserError, before any process group or model is made, where `output` has a checkpoint of another run.
    """

    say = staticmethod(say)

    def __init__(self, prepared: Prepared, dataset: Dataset) -> None:
        config = self.config = prepared.config
        self.prepared, self.dataset = prepared, dataset
        self.total_steps = total_steps(config.training, dataset, config.rows_per_step)
        origin = Origin.of(config, prepared.model_path, dataset.fingerprint)
        self.checkpoints = Checkpoints(config.output_dir, config.checkpoint, origin)
        if self.checkpoints.done > self.total_steps:
            raise UserError(
                f"{config.output} has trained {self.checkpoints.done} steps, this config asks for {self.total_steps}; "
                "give as many steps or more, or another `output`, or checkpoint.resume=never to train anew here"
            )
        self.bridge = start_distributed(config.rollout_ranks)
        if self.bridge.generates:
            raise UserError("rollout.ranks: the commands grpo and ppo part their ranks; a loop of your own runs with 0")
        self.groups = make_groups(prepared.layout, config.training.seed)
        self.is_main = dist.get_rank() == 0
        self.directory = config.output_dir
        self.status = 0  # the command's
        self._first_step = 0
        self._engine: Engine | None = None
        self._record: Record | None = None
        self.expert_load: ExpertLoad | None = None  # of a model with experts
        self._stack = contextlib.ExitStack()

    def model(
        self, keep: str | None = None, beside: dict[str, Engine] | None = None, *, save_kept: bool = False
    ) -> Engine:
        """Collective: the model that is trained, as the newest checkpoint has it; saved and exported by the run.
        `keep`: name of a weight set for the weights that the run began with; `save_kept`: it changes, so that
        checkpoints need it. `beside`: other trained models that are saved and resumed with it, by name."""
        self.checkpoints.beside |= beside or {}
        self.checkpoints.weight_set = keep if save_kept else None
        self._engine = Engine.of(self.config, self.prepared.arch, self.groups)
        if keep is not None:
            self._engine.keep_weights(keep)
        self._first_step = self.checkpoints.resume(self._engine)
        self.expert_load = ExpertLoad(self._engine) if self.prepared.arch.moe is not None else None
        return self._engine

    def closing(self, thing: Closing) -> Closing:
        """`thing`, which is closed however the run ends."""
        self._stack.callback(thing.close)  # type: ignore[attr-defined]
        return thing

    def steps(self) -> Iterator[Step]:
        """Collective: the steps that are left; after each body it saves where due, after the last one it exports."""
        assert self._engine is not None, "call model() first"
        self._record = Record(self.config, self.total_steps, self._first_step)
        self.say(f"{self.dataset.message}; {self.total_steps} steps on {self.prepared.layout}")
        self._record.describe(data=self.dataset.message, layout=str(self.prepared.layout))
        if (warm_up := self.config.optimizer.warmup_steps) >= self.total_steps:
            self.say(f"warning: the learning rate never gets to its peak: optimizer.warmup_steps={warm_up}")
        profiler, patience, best = self._profiler(), self.config.training.patience, self.checkpoints.best
        for index in range(self._first_step, self.total_steps):
            if patience is not None and best.looks >= patience:
                self.say(f"stopped early after step {index}: no better {best.name} in {best.looks} looks")
                break
            step = Step(self, index)
            self._engine.begin_step(index)
            yield step
            if profiler is not None:
                profiler.step()
            if step.logged is None:
                raise RuntimeError(f"step {step.number} was not logged")
            if self.checkpoints.after_step(self._engine, self._record, step.number, step.logged):
                self.status = REQUEUE_STATUS
                return
        export_run(self._engine, self.checkpoints, self._record, self.prepared.model_path)

    def _profiler(self) -> torch.profiler.profile | None:
        """Of `logging.profile` steps after this start's first, on every rank: OUTPUT/profile/rank_0.json, a Chrome
        trace."""
        steps, left = self.config.logging.profile, self.total_steps - self._first_step
        if steps is None or not left:
            return None
        directory, warm_up = self.directory / "profile", int(left > 1)
        directory.mkdir(exist_ok=True)
        return self._stack.enter_context(
            torch.profiler.profile(
                schedule=torch.profiler.schedule(wait=0, warmup=warm_up, active=min(steps, left - warm_up), repeat=1),
                on_trace_ready=lambda trace: trace.export_chrome_trace(str(directory / f"rank_{dist.get_rank()}.json")),
            )
        )

    def log(self, number: int, metrics: Mapping[str, float]) -> None:
        assert self._record is not None
        self._record.log(number, dict(metrics))
        for listener in _listeners:
            listener(number, metrics)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if self._record is not None:
            self._record.close(error)
        try:
            self._stack.close()
        except Exception as second:
            if error is None:
                raise
            print(f"rank {dist.get_rank()}, closing after an error: {second}", flush=True)
        if isinstance(error, NotFiniteError) and self._record is not None:
            self.checkpoints.finish()  # all ranks are here
            raise NotFiniteError(f"step {self._record.current_step}: {error}") from None


class Step:
    """One step of a run, in phases that are timed; logged once."""

    def __init__(self, run: Run, index: int) -> None:
        self.run, self.index = run, index  # from 0
        self.logged: dict[str, float] | None = None  # its figures
        self._timer = PhaseTimer(memory=True)
        self._apart: set[str] = set()

    @property
    def number(self) -> int:
        """From 1, as in logs and names of checkpoints."""
        return self.index + 1

    @property
    def last(self) -> bool:
        return self.number == self.run.total_steps

    @property
    def saves(self) -> bool:
        """Whether a checkpoint is due after it."""
        return self.run.checkpoints.due(self.number, self.last)

    @property
    def validates(self) -> bool:
        """Whether held-out rows are looked at after it."""
        every = self.run.config.training.validate_every
        return self.last or (self.saves if every is None else self.number % every == 0)

    @property
    def learning_rate(self) -> float:
        return learning_rate(self.run.config.optimizer, self.index, self.run.total_steps)

    @contextlib.contextmanager
    def phase(self, name: str, *, apart: bool = False) -> Iterator[None]:
        """Timed, and named when it hangs. `apart`: its seconds are not the step's, such as a validation's."""
        if apart:
            self._apart.add(name)
        with self._timer(name):
            yield

    def log(self, *figures: Mapping[str, float | Mean]) -> None:
        """These, the learning rate, seconds and memory of every phase; `tokens` give `tokens_per_second`."""
        merged: dict[str, Any] = {name: value for part in figures for name, value in part.items()}
        metrics = {name: value.value if isinstance(value, Mean) else value for name, value in merged.items()}
        timer = self._timer
        seconds = timer.total() - sum(timer.seconds[name] for name in self._apart)
        metrics["learning_rate"] = self.learning_rate
        if "tokens" in metrics:
            metrics["tokens_per_second"] = metrics["tokens"] / seconds
        if self.run.expert_load is not None and (load := self.run.expert_load.take()):
            metrics["expert_load_max"] = max(map(max, load.values()))
            if self.run.is_main:
                write_whole(self.run.directory / "expert_load.json", json.dumps({"step": self.number, "load": load}))
        metrics["step_seconds"] = seconds
        metrics |= {f"{phase}_seconds": value for phase, value in timer.seconds.items()}
        metrics |= {f"{phase}_memory_gib": value for phase, value in timer.memory_gib.items()}
        self.run.log(self.number, metrics)
        self.logged = metrics


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Meanwhile `listener` hears every step of this process's runs, on every rank."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
