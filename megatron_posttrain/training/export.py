"""The trained model as a Hugging Face directory."""

import contextlib
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_posttrain.checkpoint.hf import directory_writer, model_directory
from megatron_posttrain.checkpoint.hf_files import custom_code
from megatron_posttrain.checkpoint.lora import write_adapter
from megatron_posttrain.errors import SaveError, UserError
from megatron_posttrain.models import registry
from megatron_posttrain.platform import platform
from megatron_posttrain.training.checkpoints import Checkpoints
from megatron_posttrain.training.disk import failing_together
from megatron_posttrain.training.engine import Engine
from megatron_posttrain.training.process import say
from megatron_posttrain.training.record import Record

WRITING = (OSError, UserError)  # how it fails


def export(engine: Engine, source: Path, directory: Path, tokenizer: str | None = None) -> None:
    """Collective: writes `directory` anew, with the tokenizer of another directory or hub id, and the other files of
    `source`. The first rank of each pipeline stage writes the stage's tensors, in files of their own. Raises SaveError
    on every rank when it cannot be written."""
    engine.gather_weights()
    exporter, writer = engine.exporter, None
    here = exporter.writer_of
    main = dist.get_rank() == 0
    with failing_together(directory, directory, WRITING):
        if here is not None:
            place = None if tokenizer is None else model_directory(tokenizer, "model.tokenizer")
            stages = exporter.stage_of()
            options: dict[str, Any] = {"source": source, "stages": stages, "overwrite": True, "tokenizer": place}
            layout, writer = directory_writer(directory, engine.arch, **options)
        if main and writer is not None:
            writer.begin()
    try:
        with failing_together(directory, directory, WRITING), platform().megatron():
            tensors = exporter.tensors(of_stage=True)
            try:
                if writer is not None:
                    writer.open(here)
                    for name, tensor in layout.assemble(tensors):
                        writer.write(name, tensor)
                    writer.close_files()
            finally:
                for _ in tensors:  # on all other ranks, and where it failed: each tensor is gathered by all
                    pass
        with failing_together(directory, directory, WRITING):
            if main and writer is not None:
                writer.finish()
    finally:
        if main and writer is not None:
            writer.discard()
    if left := custom_code(source):
        say(f"{directory}: left behind, custom code of {source}: {', '.join(left)}")


def export_adapter(engine: Engine, source: Path, directory: Path) -> None:
    """Collective: writes the adapter as PEFT's files. Raises SaveError on every rank when it cannot be written."""
    adapters = engine.adapters
    assert adapters is not None
    engine.gather_weights()
    with platform().megatron():
        tensors = {name: tensor.cpu() for name, tensor in engine.adapter_exporter.tensors() if dist.get_rank() == 0}
    main = dist.get_rank() == 0
    with failing_together(directory, directory, WRITING):
        if main:
            pairs = ((module, *(tensors.get(name or "") for name in names)) for module, *names in adapters.modules())
            write_adapter(directory, pairs, adapters.lora, str(source), registry.layout(engine.arch, adapters.fused))
    if both := sorted(adapters.names_in_both()):
        say(
            f"warning: {directory}: PEFT drops those of dense and shared layers that are called as experts' "
            f"are ({', '.join(both)}); tools/merge_adapter.py reads all, and hf/ has them merged"
        )


def export_run(engine: Engine, checkpoints: Checkpoints, run: Record, source: Path) -> None:
    """Collective: the run's last step as a checkpoint, then it or the best one, or their moving average, as output/hf,
    with an adapter merged, and the adapter as output/adapter; one that fails leaves the others."""
    step, best, ema = run.current_step - 1, checkpoints.best, engine.ema is not None
    checkpoints.secure(engine, run, step)
    if best.step:
        say(f"best {best.name} {best.value:.6g}, of step {best.step}")
    try:
        if run.config.checkpoint.export == "best" and best.step not in (0, step):
            checkpoints.load_best(engine)
            step = best.step
        with engine.weights("ema") if ema else contextlib.nullcontext():
            if engine.adapters is not None:
                export_adapter(engine, source, run.directory / "adapter")
            export(engine, source, run.directory / "hf", run.config.model.tokenizer)
    except SaveError as error:
        raise SaveError(f"{error}; {checkpoints.left()}") from None
    checkpoints.release(step)
    say(f"wrote {run.directory / 'hf'}, step {step}{', averaged' if ema else ''}")
