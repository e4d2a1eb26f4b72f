"""Training checkpoints: megatron-core's distributed format, written beside and renamed when whole."""

import contextlib
import copy
import json
import pickle
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megatron_posttrain.config.schema import CheckpointConfig
from megatron_posttrain.errors import SaveError, UserError
from megatron_posttrain.models import adapters
from megatron_posttrain.parallel.groups import broadcast_object
from megatron_posttrain.platform import platform
from megatron_posttrain.training.deadline import Deadline
from megatron_posttrain.training.disk import checkpoint_bytes, described, failing_together, first_problem
from megatron_posttrain.training.engine import Engine
from megatron_posttrain.training.finite import anywhere
from megatron_posttrain.training.held_out import Best
from megatron_posttrain.training.optimizer import set_hyper_parameters
from megatron_posttrain.training.process import say
from megatron_posttrain.training.record import Record
from megatron_posttrain.training.resume import STATE_FILE, Origin
from megatron_posttrain.training.stretches import STATES, Stretches, without_gathered_states
from megatron_posttrain.training.weight_sets import AVERAGE, make_room_for_average
from megatron_posttrain.training.writing import Writing
from megatron_posttrain.upstream.megatron import optimizer_can_resume, written_by_threads

# Any layout can read what any other wrote. A constant: megatron-core writes into the dict that it is given.
SHARDING = (("distrib_optim_sharding_type", "fully_reshardable"),)
CARRIED_FILE = "carried.pkl"
UNREADABLE = (OSError, RuntimeError, EOFError, pickle.UnpicklingError)


class Checkpoints:
    """`output`/checkpoints/step_000100, newest `keep` of them and the best; one without a state file is not whole."""

    def __init__(self, output: Path, config: CheckpointConfig, origin: Origin | None = None) -> None:
        """Raises UserError where the newest one is of another run than `origin` is; needs no model."""
        self.directory = output / "checkpoints"
        self.config, self.origin, self.best = config, origin, Best(config)
        self.beside: dict[str, Engine] = {}  # what is saved and loaded with the model, in a directory of this name
        self.weight_set: str | None = None  # so is a weight set of the model
        self.state: dict[str, Any] = {}  # and what a loop carries from step to step, plain values
        self.carried: Callable[[], bytes] | None = None  # collective: what else it carries, as rank 0 gives it
        self.loaded: Path | None = None  # that the run goes on from
        self._writing: Writing | None = None
        self._deadline: Deadline | None = None
        self._changes: list[str] = []
        self.done = 0  # steps of the newest one that can be gone on from
        if config.resume == "auto" and origin is not None:
            newest = next((path for path in reversed(self.whole()) if damage(path) is None), None)
            if newest is not None:
                self._changes, self.done = origin.changes(newest, read_state(newest)), _step_of(newest)

    def due(self, step: int, last: bool) -> bool:
        """Whether to save after step number `step` (from 1)."""
        return self.config.every is not None and (step % self.config.every == 0 or last)

    def after_step(self, engine: Engine, run: Record, step: int, figures: Mapping[str, float]) -> bool:
        """Collective: saves when it is due, a stop was asked for or the figures are the best so far; whether the run
        is to end before its last step."""
        if self._writing is not None and not anywhere(not self._writing.done):
            self.finish()
        better = self.best.name in figures and self.best.look(step, broadcast_object(dict(figures)))
        engines = self._engines(engine).values()
        self._deadline = self._deadline or Deadline(
            sum(checkpoint_bytes(each.precision, each.arch, each.adapters, each.ema) for each in engines)
        )
        late = run.is_main and self._deadline.near()
        stop, last = run.stop_requested(also=late), step == run.total_steps
        if stop or better or self.due(step, last):
            self.save(engine, step)
        if stop and not last:
            self.finish()
            if late:
                self._deadline.tell_job()
            say(f"stopped on request after step {step}; the same command resumes")
        return stop and not last

    def save(self, engine: Engine, step: int) -> None:
        """Collective. What a loop needs beside weights, optimizer and `state` follows from the step's number. Where it
        is `asynchronous`, files are still being written afterwards, until `finish`. Raises SaveError on every rank when
        one cannot write; what was there before stays."""
        self.finish()
        partial, kept, requests = self._paths(step)[1], self.weight_set, []
        carried = b"" if self.carried is None else self.carried()
        with self._failing_together(step):
            if dist.get_rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)
                for name in (*self._engines(engine), *([] if kept is None else [kept])):
                    (partial / name).mkdir(parents=True)
                if carried:
                    (partial / CARRIED_FILE).write_bytes(carried)
        for name, each in self._engines(engine).items():
            each.gather_weights()
            with self._failing_together(step):
                requests.append(_request(each, partial / name))
        if kept is not None:
            with self._failing_together(step), engine.weights(kept):
                requests.append(_request(engine, partial / kept, weights_only=True))
        state = {"step": step} if self.origin is None else self.origin.state(step)
        state |= {"loop": copy.deepcopy(self.state), "best": self.best.state(), "skipped": engine.skipped}
        with self._failing_together(step), platform().megatron():
            self._writing = Writing(requests, state)
        if not self.config.asynchronous:
            self.finish()

    def finish(self) -> None:
        """Collective: waits for the checkpoint that is being written, if there is one, which then counts as whole."""
        if (writing := self._writing) is None:
            return
        self._writing = None
        step = writing.state["step"]
        final, partial = self._paths(step)
        with self._failing_together(step):
            writing.wait()
        with self._failing_together(step), platform().megatron():
            writing.finish()
        with self._failing_together(step):
            if dist.get_rank() == 0:
                (partial / STATE_FILE).write_text(json.dumps(writing.state))
                shutil.rmtree(final, ignore_errors=True)
                partial.rename(final)
                self._remove_old(step, writing.state["best"]["step"])

    def _engines(self, engine: Engine) -> dict[str, Engine]:
        return {"": engine, **self.beside}

    def _paths(self, step: int) -> tuple[Path, Path]:
        """Of a whole checkpoint, and of one that is being written."""
        return self.directory / f"step_{step:06d}", self.directory / f".step_{step:06d}.partial"

    def _remove_old(self, step: int, best: int) -> None:
        """All but the newest `keep` and the best; first those of later steps, of an attempt that this one does not go
        on from, and what a killed one left."""
        for torn in self.directory.glob(".step_*.partial"):
            shutil.rmtree(torn)
        whole = self.whole()
        later = [path for path in whole if _step_of(path) > step]
        for old in [*later, *[path for path in whole if path not in later][: -self.config.keep]]:
            if _step_of(old) != best:
                shutil.rmtree(old)

    @contextlib.contextmanager
    def _failing_together(self, step: int) -> Iterator[None]:
        """Collective: the first rank's failure to write becomes every rank's SaveError, and makes room again."""
        final, partial = self._paths(step)
        try:
            with failing_together(final, partial, (OSError, RuntimeError, CheckpointException)):
                yield
        except SaveError as error:
            if dist.get_rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise SaveError(f"{error}; {self.left()}") from None

    def carried_before(self) -> bytes:
        """On rank 0, what the checkpoint has of `carried` from which the run goes on; else nothing."""
        file = None if self.loaded is None else self.loaded / CARRIED_FILE
        return file.read_bytes() if dist.get_rank() == 0 and file is not None and file.exists() else b""

    def left(self) -> str:
        """What there is to go on from, for a message."""
        whole = self.whole()
        return f"{whole[-1]} is whole, the same command goes on from it" if whole else "no checkpoint is there"

    def secure(self, engine: Engine, run: Record, step: int) -> None:
        """Collective: a checkpoint of the last step, if there is none, so that a failing export loses nothing."""
        self.finish()
        if broadcast_object(any(_step_of(path) == step for path in self.whole())):
            return
        try:
            self.save(engine, step)
            self.finish()
        except SaveError as error:  # the export, which is smaller, may still fit
            say(f"warning: no checkpoint before the export: {error}")

    def release(self, step: int) -> None:
        """Removes what `secure` has left where no checkpoints were asked for."""
        if self.config.every is None and self.config.best is None and dist.get_rank() == 0:
            shutil.rmtree(self.directory / f"step_{step:06d}", ignore_errors=True)
            with contextlib.suppress(OSError):  # others may be in it
                self.directory.rmdir()

    def load_best(self, engine: Engine) -> None:
        """Collective: the best step's weights, for the export. Raises SaveError where they cannot be read."""
        path = self._paths(self.best.step)[0]
        if problem := _load(engine, path):
            raise SaveError(f"{path}, the best step, cannot be read: {problem}")

    def whole(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted(p.parent for p in self.directory.glob(f"step_*/{STATE_FILE}"))

    def resume(self, engine: Engine) -> int:
        """Collective. Loads the newest checkpoint that can be read; the number of its step, or 0 without any. Those
        that cannot are named. Raises UserError when none of several can."""
        unreadable: list[str] = []
        while True:
            # One answer for all ranks: a shared file system may show them different listings.
            path, problem = broadcast_object(self._newest(unreadable))  # type: ignore[misc]
            if path is None or not (problem := problem or self._load(engine, path)):
                break
            unreadable.append(f"{path} cannot be read: {problem}")
            say(f"warning: {unreadable[-1]}; the one before it is tried")
        if path is None and unreadable:
            raise UserError(f"{'; '.join(unreadable)}; no other checkpoint. checkpoint.resume=never trains anew")
        self.loaded = path
        state = {} if path is None else broadcast_object(read_state(path))
        self.best.load(state.get("best"))
        engine.skipped = state.get("skipped", 0)
        if path is not None and self._changes:
            say(f"changed from step {_step_of(path) + 1} on: {', '.join(self._changes)}")
        return 0 if path is None else _step_of(path)

    def _load(self, engine: Engine, path: Path) -> str | None:
        """Collective: why the checkpoint cannot be read, the same on all ranks."""
        for name, each in self._engines(engine).items():
            if problem := _load(each, path / name):
                return problem
        kept = self.weight_set
        if kept is not None and broadcast_object((path / kept).is_dir()):  # else it changes from now on
            with engine.weights(kept):
                if problem := _load(engine, path / kept, weights_only=True):
                    return problem
        self.state = broadcast_object(read_state(path).get("loop", {}))  # type: ignore[assignment]
        return None

    def _newest(self, unreadable: list[str]) -> tuple[Path | None, str | None]:
        """The newest checkpoint but for those that were tried, and what is wrong with it as far as files tell."""
        left = self.whole()[: len(self.whole()) - len(unreadable)] if self.config.resume == "auto" else []
        return (left[-1], damage(left[-1])) if left else (None, None)


def damage(path: Path) -> str | None:
    """What files that are cut off or missing say against a checkpoint; needs no rank but this one."""
    from torch.distributed.checkpoint import FileSystemReader

    try:
        read_state(path)
        ends: dict[str, int] = {}
        for place in (path, *(part for part in path.iterdir() if part.is_dir())):
            for info in (FileSystemReader(str(place)).read_metadata().storage_data or {}).values():
                name = str((place / info.relative_path).relative_to(path))
                ends[name] = max(ends.get(name, 0), info.offset + info.length)
    except Exception as error:  # a damaged pickle may raise anything
        return described(error)
    for name, end in sorted(ends.items()):
        size = (path / name).stat().st_size if (path / name).exists() else 0
        if size < end:
            return f"{name} has {size:,} bytes, {end:,} were written"
    return None


def read_state(path: Path) -> dict[str, Any]:
    return json.loads((path / STATE_FILE).read_text())


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _load(engine: Engine, path: Path, *, weights_only: bool = False) -> str | None:
    """Collective: why the checkpoint cannot be read, the same on all ranks."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.core import CheckpointingException

    problem = None
    try:
        with platform().megatron(), optimizer_can_resume(), without_gathered_states():
            state, stretches = (_model_state(engine), None) if weights_only else _sharded_state(engine, loading=True)
            loaded = dist_checkpointing.load(state, str(path), validate_access_integrity=False)
            for index, chunk in enumerate(engine.modules):
                chunk.load_state_dict(loaded.get(_model_key(engine, index), {}), strict=False)
            if stretches is not None:
                engine.optimizer.load_state_dict(loaded["optimizer"])
                if engine.ema is not None:
                    make_room_for_average(engine.optimizer)
                stretches.restore()
                for chunk in engine.chunks:
                    chunk.start_param_sync(force_sync=True)
                if engine.optimizer_config is not None:
                    set_hyper_parameters(engine.optimizer, engine.optimizer_config)
    except torch.OutOfMemoryError:
        raise
    except (CheckpointException, CheckpointingException, *UNREADABLE) as error:
        problem = described(error)
    return first_problem(problem)


def _request(engine: Engine, path: Path, *, weights_only: bool = False) -> Any:
    """Collective: what this rank writes, copied; megatron-core's AsyncRequest."""
    from megatron.core import dist_checkpointing

    with platform().megatron(), optimizer_can_resume(), without_gathered_states(), written_by_threads():
        return dist_checkpointing.save(
            _own(_model_state(engine)) if weights_only else _sharded_state(engine, loading=False)[0],
            str(path),
            # It gathers every rank's entries on every rank; torch checks that all of a tensor is there, once.
            validate_access_integrity=False,
            content_metadata=dict(SHARDING),
            async_sharded_save=True,
        )


def _model_key(engine: Engine, index: int) -> str:
    return f"model{index}" if len(engine.modules) > 1 else "model"


def _model_state(engine: Engine) -> dict[str, Any]:
    """Of weights, or of adapters alone."""
    return {
        _model_key(engine, index): (
            chunk.sharded_state_dict(metadata=dict(SHARDING))  # type: ignore[operator]
            if engine.adapters is None
            else adapters.sharded(chunk, engine.adapters, engine.groups)
        )
        for index, chunk in enumerate(engine.modules)
    }


def _own(state: dict[str, Any]) -> dict[str, Any]:
    """With copies of the tensors, which may change while they are written."""
    for entry in (entry for chunk in state.values() for entry in chunk.values()):
        if isinstance(getattr(entry, "data", None), torch.Tensor):
            entry.data = entry.data.detach().to("cpu", copy=True)
    return state


def _sharded_state(engine: Engine, *, loading: bool) -> tuple[dict[str, Any], Stretches]:
    """What megatron-core saves, or loads into. Trained weights are not loaded: they are the optimizer's, rounded."""
    state = _model_state(engine)
    stretches = Stretches(engine.optimizer, list(state.values()), STATES + (AVERAGE,) * (engine.ema is not None))
    optimizer = engine.optimizer.sharded_state_dict(state, is_loading=loading, metadata=dict(SHARDING))
    rest = {key: stretches.without_trained(chunk) for key, chunk in state.items()}
    if loading and engine.precision.fp8 is None:  # what modules keep beside tensors is FP8's
        rest = {
            key: {name: entry for name, entry in chunk.items() if not name.endswith("_extra_state")}
            for key, chunk in rest.items()
        }
    pieces = stretches.to_load() if loading else stretches.to_save()
    return (rest if loading else _own(rest)) | {"optimizer": optimizer, "stretches": pieces}, stretches
