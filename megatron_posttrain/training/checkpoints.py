"""Training checkpoints: megatron-core's distributed format, written beside and renamed when whole."""

from __future__ import annotations

import contextlib
import json
import multiprocessing.dummy
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megatron_posttrain.config.schema import CheckpointConfig
from megatron_posttrain.errors import SaveError, UserError
from megatron_posttrain.parallel.groups import broadcast_object
from megatron_posttrain.platform import platform
from megatron_posttrain.platform.scope import replaced
from megatron_posttrain.training.adapter_state import sharded_adapters
from megatron_posttrain.training.deadline import Deadline
from megatron_posttrain.training.disk import agree, cause, checkpoint_bytes, described, first_problem
from megatron_posttrain.training.engine import Engine
from megatron_posttrain.training.optimizer import set_hyper_parameters
from megatron_posttrain.training.record import Record
from megatron_posttrain.training.resume import STATE_FILE, Origin
from megatron_posttrain.training.stretches import Stretches, without_gathered_states
from megatron_posttrain.upstream.megatron import optimizer_can_resume

# Any layout can read what any other wrote. A constant: megatron-core writes into the dict that it is given.
SHARDING = (("distrib_optim_sharding_type", "fully_reshardable"),)
UNREADABLE = (OSError, RuntimeError, EOFError, pickle.UnpicklingError)


class Checkpoints:
    """`output`/checkpoints/step_000100, newest `keep` of them; a directory without a state file is not whole."""

    def __init__(self, output: Path, config: CheckpointConfig, origin: Origin | None = None) -> None:
        """Raises UserError where the newest one is of another run than `origin` is; needs no model."""
        self.directory = output / "checkpoints"
        self.config, self.origin = config, origin
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

    def after_step(self, engine: Engine, run: Record, step: int) -> bool:
        """Collective: saves when it is due or a stop was asked for; whether the run is to end before its last step."""
        self._deadline = self._deadline or Deadline(checkpoint_bytes(engine.precision, engine.arch, engine.adapters))
        late = run.is_main and self._deadline.near()
        stop, last = run.stop_requested(also=late), step == run.total_steps
        if stop or self.due(step, last):
            self.save(engine, step)
        if stop and not last:
            if late:
                self._deadline.tell_job()
            run.say(f"stopped on request after step {step}; the same command resumes")
        return stop and not last

    def save(self, engine: Engine, step: int) -> None:
        """Collective. What a loop needs beside weights and optimizer follows from the step's number.

        Raises SaveError on every rank when one cannot write; what was there before stays.
        """
        final = self.directory / f"step_{step:06d}"
        partial = self.directory / f".step_{step:06d}.partial"
        with self._failing_together(final, partial):
            if dist.get_rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
        engine.gather_weights()
        with self._failing_together(final, partial):
            from megatron.core import dist_checkpointing

            with platform().megatron(), optimizer_can_resume(), without_gathered_states(), _written_by_threads():
                dist_checkpointing.save(
                    _sharded_state(engine, loading=False)[0],
                    str(partial),
                    # It gathers every rank's entries on every rank; torch checks that all of a tensor is there, once.
                    validate_access_integrity=False,
                    content_metadata=dict(SHARDING),
                )
        with self._failing_together(final, partial):
            if dist.get_rank() == 0:
                state = {"step": step} if self.origin is None else self.origin.state(step)
                (partial / STATE_FILE).write_text(json.dumps(state))
                shutil.rmtree(final, ignore_errors=True)
                partial.rename(final)
                self._remove_old(step)

    def _remove_old(self, step: int) -> None:
        """All but the newest `keep`; first those of later steps, of an attempt that this one does not go on from."""
        whole = self.whole()
        later = [path for path in whole if _step_of(path) > step]
        for old in [*later, *[path for path in whole if path not in later][: -self.config.keep]]:
            shutil.rmtree(old)

    @contextlib.contextmanager
    def _failing_together(self, final: Path, partial: Path) -> Iterator[None]:
        """Collective: the first rank's failure to write becomes every rank's SaveError, and makes room again."""
        problem = None
        try:
            yield
        except (OSError, RuntimeError, CheckpointException) as error:
            problem = f"{final} could not be written: {cause(partial, error)}"
        try:
            agree(problem)
        except SaveError as error:
            if dist.get_rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise SaveError(f"{error}; {self.left()}") from None

    def left(self) -> str:
        """What there is to go on from, for a message."""
        whole = self.whole()
        return f"{whole[-1]} is whole, the same command goes on from it" if whole else "no checkpoint is there"

    def secure(self, engine: Engine, run: Record) -> None:
        """Collective: a checkpoint of the last step, if there is none, so that a failing export loses nothing."""
        if broadcast_object(any(_step_of(path) == run.total_steps for path in self.whole())):
            return
        try:
            self.save(engine, run.total_steps)
        except SaveError as error:  # the export, which is smaller, may still fit
            run.say(f"warning: no checkpoint before the export: {error}")

    def release(self, step: int) -> None:
        """Removes what `secure` has left where no checkpoints were asked for."""
        if self.config.every is None and dist.get_rank() == 0:
            shutil.rmtree(self.directory / f"step_{step:06d}", ignore_errors=True)
            with contextlib.suppress(OSError):  # others may be in it
                self.directory.rmdir()

    def whole(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted(p.parent for p in self.directory.glob(f"step_*/{STATE_FILE}"))

    def resume(self, engine: Engine) -> int:
        """Collective. Loads the newest checkpoint that can be read; the number of its step, or 0 without any.

        Those that cannot are named. Raises UserError when none of several can.
        """
        unreadable: list[str] = []
        path: Path | None
        problem: str | None
        while True:
            # One answer for all ranks: a shared file system may show them different listings.
            path, problem = broadcast_object(self._newest(unreadable))  # type: ignore[misc]
            if path is None or not (problem := problem or _load(engine, path)):
                break
            unreadable.append(f"{path} cannot be read: {problem}")
            _say(f"warning: {unreadable[-1]}; the one before it is tried")
        if path is None and unreadable:
            raise UserError(
                f"{'; '.join(unreadable)}; no other checkpoint is there. checkpoint.resume=never trains anew"
            )
        if path is not None and self._changes:
            _say(f"changed from step {_step_of(path) + 1} on: {', '.join(self._changes)}")
        return 0 if path is None else _step_of(path)

    def _newest(self, unreadable: list[str]) -> tuple[Path | None, str | None]:
        """The newest checkpoint but for those that were tried, and what is wrong with it as far as files tell."""
        left = self.whole()[: len(self.whole()) - len(unreadable)] if self.config.resume == "auto" else []
        return (left[-1], damage(left[-1])) if left else (None, None)


def damage(path: Path) -> str | None:
    """What files that are cut off or missing say against a checkpoint; needs no rank but this one."""
    from torch.distributed.checkpoint import FileSystemReader

    try:
        read_state(path)
        stored = FileSystemReader(str(path)).read_metadata().storage_data
    except Exception as error:  # a damaged pickle may raise anything
        return described(error)
    ends: dict[str, int] = {}
    for info in (stored or {}).values():
        ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    for name, end in sorted(ends.items()):
        size = (path / name).stat().st_size if (path / name).exists() else 0
        if size < end:
            return f"{name} has {size:,} bytes, {end:,} were written"
    return None


def read_state(path: Path) -> dict[str, Any]:
    return json.loads((path / STATE_FILE).read_text())


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


def _load(engine: Engine, path: Path) -> str | None:
    """Collective: why the checkpoint cannot be read, the same on all ranks."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.core import CheckpointingException

    problem = None
    try:
        with platform().megatron(), optimizer_can_resume(), without_gathered_states():
            state, stretches = _sharded_state(engine, loading=True)
            loaded = dist_checkpointing.load(state, str(path), validate_access_integrity=False)
            for index, chunk in enumerate(engine.modules):
                chunk.load_state_dict(loaded.get(_model_key(engine, index), {}), strict=False)
            engine.optimizer.load_state_dict(loaded["optimizer"])
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


def _written_by_threads() -> contextlib.AbstractContextManager[None]:
    """megatron-core 0.16.1 forks a process for each of a rank's files, though CUDA's, gloo's and vLLM's threads do not
    survive a fork, and starts one more, that stays, to hear from them: 2 to 4 s before a rank's first byte."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    threads = SimpleNamespace(get_context=lambda method: multiprocessing.dummy)
    return replaced([(filesystem_async, "mp", threads), (filesystem_async, "_results_queue", None)])


def _model_key(engine: Engine, index: int) -> str:
    return f"model{index}" if len(engine.modules) > 1 else "model"


def _sharded_state(engine: Engine, *, loading: bool) -> tuple[dict[str, Any], Stretches]:
    """What megatron-core saves, or loads into. Trained weights are not loaded: they are the optimizer's, rounded."""
    state: dict[str, Any] = {
        _model_key(engine, index): (
            chunk.sharded_state_dict(metadata=dict(SHARDING))  # type: ignore[operator]
            if engine.adapters is None
            else sharded_adapters(chunk, engine.adapters, engine.groups)
        )
        for index, chunk in enumerate(engine.modules)
    }
    stretches = Stretches(engine.optimizer, list(state.values()))
    optimizer = engine.optimizer.sharded_state_dict(state, is_loading=loading, metadata=dict(SHARDING))
    rest = {key: stretches.without_trained(chunk) for key, chunk in state.items()}
    if loading and engine.precision.fp8 is None:  # what modules keep beside tensors is FP8's
        rest = {
            key: {name: entry for name, entry in chunk.items() if not name.endswith("_extra_state")}
            for key, chunk in rest.items()
        }
    pieces = stretches.to_load() if loading else stretches.to_save()
    return rest | {"optimizer": optimizer, "stretches": pieces}, stretches
