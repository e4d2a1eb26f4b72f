"""The trained model as a Hugging Face directory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from megatron_posttrain.checkpoint.hf import write_directory
from megatron_posttrain.platform import platform
from megatron_posttrain.training.engine import Engine


def full_tensors(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    """Collective: every Hugging Face tensor, whole, in one order on every rank; a bucket in memory at a time."""
    engine.gather_weights()
    with platform().megatron():
        yield from engine.exporter.hf_tensors()


def export(engine: Engine, source: Path, directory: Path) -> None:
    """Collective: writes `directory` anew, with the tokenizer and other files of `source`."""
    tensors = full_tensors(engine)
    if dist.get_rank() == 0:
        write_directory(directory, engine.arch, tensors, source=source, overwrite=True)
    else:
        for _ in tensors:
            pass
    dist.barrier()
