"""The trained model as a Hugging Face directory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from megatron_posttrain.checkpoint.hf import model_directory, write_directory
from megatron_posttrain.checkpoint.hf_files import custom_code
from megatron_posttrain.platform import platform
from megatron_posttrain.training.engine import Engine


def full_tensors(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    """Collective: every Hugging Face tensor, whole, in one order on every rank; a bucket in memory at a time."""
    engine.gather_weights()
    with platform().megatron():
        yield from engine.exporter.hf_tensors()


def export(engine: Engine, source: Path, directory: Path) -> None:
    """Collective: writes `directory` anew, with the run's tokenizer and the other files of `source`."""
    tensors = full_tensors(engine)
    if dist.get_rank() == 0:
        of_run = engine.config.model.tokenizer
        tokenizer = None if of_run is None else model_directory(of_run, "model.tokenizer")
        write_directory(directory, engine.arch, tensors, source=source, overwrite=True, tokenizer=tokenizer)
        if left := custom_code(source):
            print(f"{directory}: left behind, custom code of {source}: {', '.join(left)}", flush=True)
    else:
        for _ in tensors:
            pass
    dist.barrier()
