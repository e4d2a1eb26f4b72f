"""Training checkpoints: megatron-core's distributed format, written beside and renamed when whole."""

from __future__ import annotations

import contextlib
import json
import multiprocessing.dummy
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist

from megatron_posttrain.config.schema import CheckpointConfig
from megatron_posttrain.parallel.groups import broadcast_object
from megatron_posttrain.platform import platform
from megatron_posttrain.platform.scope import replaced
from megatron_posttrain.training.engine import Engine
from megatron_posttrain.training.optimizer_fixes import optimizer_can_resume
from megatron_posttrain.training.run import Run

# Any data parallel size can read what any other wrote.
SHARDING = {"distrib_optim_sharding_type": "fully_reshardable"}
STATE_FILE = "trainer_state.json"


class Checkpoints:
    """`output`/checkpoints/step_000100, newest `keep` of them; a directory without a state file is not whole."""

    def __init__(self, output: Path, config: CheckpointConfig) -> None:
        self.directory = output / "checkpoints"
        self.config = config

    def due(self, step: int, last: bool) -> bool:
        """Whether to save after step number `step` (from 1)."""
        return self.config.every is not None and (step % self.config.every == 0 or last)

    def after_step(self, engine: Engine, run: Run, step: int) -> bool:
        """Collective: saves when it is due or a stop was asked for; whether the run is to end before its last step."""
        stop, last = run.stop_requested(), step == run.total_steps
        if stop or self.due(step, last):
            self.save(engine, step)
        if stop and not last:
            run.say(f"stopped on request after step {step}; the same command resumes")
        return stop and not last

    def save(self, engine: Engine, step: int) -> None:
        """Collective. What a loop needs beside weights and optimizer follows from the step's number."""
        from megatron.core import dist_checkpointing

        final = self.directory / f"step_{step:06d}"
        partial = self.directory / f".step_{step:06d}.partial"
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        engine.gather_weights()
        with platform().megatron(), optimizer_can_resume(), _written_by_threads():
            dist_checkpointing.save(_sharded_state(engine, loading=False), str(partial), content_metadata=SHARDING)
        dist.barrier()
        if dist.get_rank() == 0:
            (partial / STATE_FILE).write_text(json.dumps({"step": step}))
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            for old in self.whole()[: -self.config.keep]:
                shutil.rmtree(old)
        dist.barrier()

    def whole(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted(p.parent for p in self.directory.glob(f"step_*/{STATE_FILE}"))

    def resume(self, engine: Engine) -> int:
        """Collective. Loads the newest whole checkpoint; the number of its step, or 0 when there is none."""
        from megatron.core import dist_checkpointing

        newest = self.whole()[-1:] if self.config.resume == "auto" else []
        # One answer for all ranks: a shared file system may show them different listings.
        path = broadcast_object(str(newest[0]) if newest else None)
        if path is None:
            return 0
        with platform().megatron(), optimizer_can_resume():
            loaded = dist_checkpointing.load(_sharded_state(engine, loading=True), str(path))
            for index, chunk in enumerate(engine.modules):
                chunk.load_state_dict(loaded[_model_key(engine, index)], strict=False)
            engine.optimizer.load_state_dict(loaded["optimizer"])
        return json.loads((Path(str(path)) / STATE_FILE).read_text())["step"]


def _written_by_threads() -> contextlib.AbstractContextManager[None]:
    """megatron-core 0.16.1 forks a process for each of a rank's files, though CUDA's, gloo's and vLLM's threads do not
    survive a fork, and starts one more, that stays, to hear from them: 2 to 4 s before a rank's first byte."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    threads = SimpleNamespace(get_context=lambda method: multiprocessing.dummy)
    return replaced([(filesystem_async, "mp", threads), (filesystem_async, "_results_queue", None)])


def _model_key(engine: Engine, index: int) -> str:
    return f"model{index}" if len(engine.modules) > 1 else "model"


def _sharded_state(engine: Engine, *, loading: bool) -> dict[str, Any]:
    state: dict[str, Any] = {
        _model_key(engine, index): chunk.sharded_state_dict(metadata=SHARDING)  # type: ignore[operator]
        for index, chunk in enumerate(engine.modules)
    }
    state["optimizer"] = engine.optimizer.sharded_state_dict(state, is_loading=loading, metadata=SHARDING)
    return state
