"""Room for what a run writes, and why a write failed."""

import contextlib
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException

from megatron_posttrain.config.schema import Config, PrecisionConfig
from megatron_posttrain.errors import SaveError, UserError
from megatron_posttrain.models import registry
from megatron_posttrain.models.adapters import Adapters, find_adapters
from megatron_posttrain.models.architecture import Architecture
from megatron_posttrain.output import check_output
from megatron_posttrain.parallel.exchange import gathered
from megatron_posttrain.training.finite import anywhere

PROBE_BYTES = 1 << 20
OPTIMIZER_BYTES = 12  # a parameter: fp32 main weight and two moments
FILES = ("config.yaml", "metrics.jsonl", "environment.json", ".stop", "trackers.json")
DIRECTORIES = ("checkpoints", "hf", "critic", "adapter", "heartbeats", "tensorboard", "rollouts", "profile")


def check_disk(config: Config, arch: Architecture) -> None:
    """Raises UserError where `output` cannot be written to, or has no room for the export and a checkpoint."""
    output = config.output_dir
    there = check_output(output, files=FILES)
    for name in DIRECTORIES:
        if (output / name).exists():
            check_output(output / name)
    parts = {"the export": 2 * registry.parameter_count(arch)}  # at least: bf16
    if config.checkpoint.every is not None:
        adapters = None if config.lora is None else find_adapters(arch, config.lora)
        parts["a checkpoint"] = checkpoint_bytes(config.precision, arch, adapters, config.training.ema)
    free, needed = shutil.disk_usage(there).free, sum(parts.values())
    if free < needed:
        listed = " and ".join(f"{name} takes {_size(size)}" for name, size in parts.items())
        raise UserError(f"output={output}: {_size(free)} are free there, {listed}; make room or choose another one")


def checkpoint_bytes(
    precision: PrecisionConfig, arch: Architecture, adapters: Adapters | None = None, ema: float | None = None
) -> int:
    each = (4 if precision.dtype == "fp32" else 2) + OPTIMIZER_BYTES + 4 * (ema is not None)
    plans = registry.tensors(arch) if adapters is None else adapters.plans.values()
    return each * sum(math.prod(plan.local_shape(1)) for plan in plans)


def _size(count: float) -> str:
    return f"{count / 2**30:,.1f} GiB" if count >= 2**29 else f"{count / 2**20:,.1f} MiB"


def cause(directory: Path, error: BaseException) -> str:
    """Why a write below `directory` failed, in the system's words where they can be found."""
    for part in _chain(error):
        if isinstance(part, OSError) and part.strerror:
            return part.strerror + (f" ({part.filename})" if part.filename else "")
    # torch's writer of files reports an internal position; the next write meets what it met.
    files = sorted((f for f in directory.glob("*") if f.is_file()), key=lambda f: -f.stat().st_size)
    for file in files[:2]:
        try:
            with file.open("ab") as stream:
                stream.write(bytes(PROBE_BYTES))
                os.fsync(stream.fileno())
        except OSError as found:
            return str(found.strerror)
    return described(error)


def described(error: BaseException) -> str:
    """One line about an error, where several ranks had one about the first of them."""
    first = next((part for part in _chain(error) if not isinstance(part, CheckpointException)), error)
    return f"{type(first).__name__}: {(str(first).strip().splitlines() or [''])[0]}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        if isinstance(error, CheckpointException):
            for failure, _ in error.failures.values():
                yield from _chain(failure)
        error = error.__cause__ or error.__context__


@contextlib.contextmanager
def failing_together(target: Path, files: Path, kinds: tuple[type[BaseException], ...]) -> Iterator[None]:
    """Collective: the first rank's failure of these kinds to write `target`, as `files`, is every rank's SaveError."""
    problem = None
    try:
        yield
    except kinds as error:
        why = str(error) if isinstance(error, UserError) else cause(files, error)
        problem = f"{target} could not be written: {why}"
    if found := first_problem(problem):
        raise SaveError(found)


def first_problem(problem: str | None) -> str | None:
    """Collective: the lowest rank's, on every rank. Words are gathered only where there are any."""
    if not anywhere(problem is not None):
        return None
    return next(filter(None, gathered(problem)), None)
