"""The trained model as a Hugging Face directory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from megatron_posttrain.checkpoint.hf import model_directory, write_directory
from megatron_posttrain.checkpoint.hf_files import custom_code
from megatron_posttrain.errors import SaveError, UserError
from megatron_posttrain.platform import platform
from megatron_posttrain.training.checkpoints import Checkpoints
from megatron_posttrain.training.disk import agree, cause
from megatron_posttrain.training.engine import Engine
from megatron_posttrain.training.record import Record


def full_tensors(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    """Collective: every Hugging Face tensor, whole, in one order on every rank; a bucket in memory at a time."""
    engine.gather_weights()
    with platform().megatron():
        yield from engine.exporter.hf_tensors()


def export(engine: Engine, source: Path, directory: Path, tokenizer: str | None = None) -> None:
    """Collective: writes `directory` anew, with the tokenizer of another directory or hub id, and the other files of
    `source`.

    Raises SaveError on every rank when it cannot be written.
    """
    tensors = full_tensors(engine)
    problem = None
    try:
        if dist.get_rank() == 0:
            place = None if tokenizer is None else model_directory(tokenizer, "model.tokenizer")
            write_directory(directory, engine.arch, tensors, source=source, overwrite=True, tokenizer=place)
            if left := custom_code(source):
                print(f"{directory}: left behind, custom code of {source}: {', '.join(left)}", flush=True)
    except OSError as error:
        problem = f"{directory} could not be written: {cause(directory, error)}"
    except UserError as error:
        problem = f"{directory} could not be written: {error}"
    for _ in tensors:  # on all other ranks, and where it failed: each tensor is gathered by all
        pass
    agree(problem)


def export_run(engine: Engine, checkpoints: Checkpoints, run: Record, source: Path) -> None:
    """Collective: the run's last step as a checkpoint, then as output/hf; one that fails leaves the other."""
    checkpoints.secure(engine, run)
    try:
        export(engine, source, run.directory / "hf", run.config.model.tokenizer)
    except SaveError as error:
        raise SaveError(f"{error}; {checkpoints.left()}") from None
    checkpoints.release(run.total_steps)
    run.say(f"wrote {run.directory / 'hf'}")
