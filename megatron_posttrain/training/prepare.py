"""Every check that needs no model, in the order in which a user would want to hear of a mistake."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_posttrain.checkpoint.hf import check_directory, read_json
from megatron_posttrain.config.schema import Config
from megatron_posttrain.data.tokenize import load_tokenizer
from megatron_posttrain.errors import UserError
from megatron_posttrain.models import registry
from megatron_posttrain.models.architecture import Architecture
from megatron_posttrain.parallel.layout import Layout, check_layout
from megatron_posttrain.platform import platform


@dataclass(frozen=True)
class Prepared:
    """A checked config and what was learned while checking it."""

    arch: Architecture
    layout: Layout
    tokenizer: Any
    model_path: Path


def prepare(config: Config, world_size: int | None = None) -> Prepared:
    """Raises UserError for whatever is wrong with the model, tokenizer, layout or precision."""
    if world_size is None:
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
    path = model_directory(config.model.path)
    if config.model.random_init:
        arch = registry.architecture_from_hf(read_json(path / "config.json"))
    else:
        arch = check_directory(path)[1]
    layout = Layout.from_config(config.parallel, world_size)
    check_layout(layout, arch)
    _check_batch(config, layout)
    _check_implementation(config)
    tokenizer = load_tokenizer(str(config.model.tokenizer or path))
    if len(tokenizer) > arch.vocab_size:
        raise UserError(
            f"{config.model.tokenizer or path}: the tokenizer has {len(tokenizer)} tokens, "
            f"the model's vocabulary only {arch.vocab_size}"
        )
    return Prepared(arch, layout, tokenizer, path)


def model_directory(path: str) -> Path:
    """A local directory, or the directory of a hub id in the local cache; nothing is downloaded."""
    if Path(path).is_dir():
        return Path(path)
    if path.count("/") == 1 and not path.startswith((".", "/")):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            return Path(snapshot_download(path, local_files_only=True))
        except LocalEntryNotFoundError:
            raise UserError(
                f"model.path: no directory '{path}', and no hub model of that id in the local cache "
                "(fetch it first with `hf download`)"
            ) from None
    raise UserError(f"model.path: no directory '{path}'")


def _check_batch(config: Config, layout: Layout) -> None:
    training = config.training
    rows = layout.data * training.micro_batch_size
    if training.global_batch_size % rows:
        lower = training.global_batch_size // rows * rows
        nearest = [n for n in (lower, lower + rows) if n]
        raise UserError(
            f"training.global_batch_size={training.global_batch_size} is not divisible by data parallel ranks x "
            f"micro_batch_size = {layout.data} x {training.micro_batch_size}; nearest: {' or '.join(map(str, nearest))}"
        )
    count = training.global_batch_size // rows
    if layout.virtual_pipeline and count % layout.pipeline:
        raise UserError(
            f"an interleaved pipeline needs a multiple of pipeline={layout.pipeline} micro-batches a rank, "
            f"found {count} (training.global_batch_size={training.global_batch_size} over {rows} rows at a time)"
        )


def _check_implementation(config: Config) -> None:
    device = platform()
    if config.model.implementation == "transformer_engine" and not device.has_transformer_engine():
        raise UserError(
            f"model.implementation=transformer_engine, but Transformer Engine is not installed on this "
            f"{device.name} machine; allowed here: auto, torch"
        )
    if config.precision.fp8 is not None and not device.has_transformer_engine():
        raise UserError(f"precision.fp8={config.precision.fp8} needs Transformer Engine on a GPU; here: fp8=null")
    if config.lora is not None:
        raise UserError("lora: training adapters is not supported by this version; remove the section")
