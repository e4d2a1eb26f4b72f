"""Every check that needs no model, in the order in which a user would want to hear of a mistake."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_posttrain.checkpoint.hf import check_directory, model_directory, read_json
from megatron_posttrain.config.schema import Config
from megatron_posttrain.data.tokenize import load_tokenizer
from megatron_posttrain.errors import UserError
from megatron_posttrain.models import registry
from megatron_posttrain.models.adapters import check_quantization, find_adapters
from megatron_posttrain.models.architecture import Architecture
from megatron_posttrain.models.build import use_transformer_engine
from megatron_posttrain.models.layout_checks import check_layout
from megatron_posttrain.parallel.layout import Layout, batch_problem
from megatron_posttrain.parallel.network import check_interfaces
from megatron_posttrain.platform import platform
from megatron_posttrain.platform.describe import refuse_unused_gpu
from megatron_posttrain.training.disk import check_disk
from megatron_posttrain.training.held_out import held_out_problems
from megatron_posttrain.training.resume import keep_date
from megatron_posttrain.training.trackers import tracker_problems


@dataclass(frozen=True)
class Prepared:
    """A checked config and what was learned while checking it."""

    config: Config
    arch: Architecture
    layout: Layout
    tokenizer: Any
    model_path: Path


def prepare(config: Config, world_size: int | None = None) -> Prepared:
    """Raises UserError for whatever is wrong with the model, layout, batch, precision or tokenizer."""
    training = world_size is None
    if world_size is None:
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
    path = model_directory(config.model.path)
    arch = read_architecture(config, path)
    layout = check_ranks(config, world_size, arch)
    if wrong := list(batch_problems(config, layout)):
        raise UserError("; ".join(wrong))
    _check_implementation(config)
    _check_routers(config, arch)
    _check_adapters(config, arch, layout)
    check_interfaces()
    if training:
        check_launcher()
        refuse_unused_gpu()
        if (config.output_dir / "hf").resolve() == path.resolve():
            raise UserError(f"output={config.output}: the export would replace its hf/, the model.path; name another")
        check_disk(config, arch)
        keep_date(config)
    tokenizer = read_tokenizer(config.model.tokenizer or path, arch, path)
    return Prepared(config, arch, layout, tokenizer, path)


def check_ranks(config: Config, ranks: int, arch: Architecture | None) -> Layout:
    """The layout of those ranks of a job that train. Raises UserError."""
    apart = config.rollout_ranks
    if apart >= ranks:
        allowed = f"0 (every rank does both) to {ranks - 1}" if ranks > 1 else "0, or more ranks (torchrun)"
        raise UserError(f"rollout.ranks={apart} leaves none of the {ranks} ranks to train; allowed: {allowed}")
    try:
        return check_layout(Layout.from_config(config.parallel, ranks - apart), arch)
    except UserError as error:
        raise UserError(f"{error}; rollout.ranks={apart} of {ranks} do not train" if apart else str(error)) from None


def check_launcher() -> None:
    """Raises UserError where the environment speaks of several processes, but not of how they find each other."""
    size = os.environ.get("WORLD_SIZE", "1")
    absent = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if size != "1" and absent:
        raise UserError(
            f"the environment has WORLD_SIZE={size}, but not {', '.join(absent)}: start this with torchrun or "
            "launch/node.sh, or unset WORLD_SIZE to train with one process"
        )


def read_architecture(config: Config, directory: Path) -> Architecture:
    """Of a directory whose tensors, where they are to be read, are all there and in shape. Raises UserError."""
    if config.model.random_init:
        return registry.architecture_from_hf(read_json(directory / "config.json"))
    return check_directory(directory)[1]


def check_beside(key: str, name: str, layout: Layout) -> tuple[Path, Architecture]:
    """Of a second model that runs in the run's layout: its directory and architecture. Raises UserError."""
    path = model_directory(name, key)
    arch = check_directory(path)[1]
    try:
        check_layout(layout, arch)
    except UserError as error:
        raise UserError(f"{key}={path}, which runs in the layout of model.path: {error}") from None
    return path, arch


def read_tokenizer(place: Path | str, arch: Architecture | None, model: Path | None = None) -> Any:
    """The tokenizer of `place` for a `model`, which may be another directory. Raises UserError where it cannot be read,
    has no chat template, or more tokens than the model's vocabulary."""
    tokenizer = load_tokenizer(str(place), model)
    if arch is not None and len(tokenizer) > arch.vocab_size:
        found = f"{len(tokenizer)} tokens, the model's vocabulary only {arch.vocab_size}"
        raise UserError(f"{place}: the tokenizer has {found}")
    return tokenizer


def batch_problems(config: Config, layout: Layout) -> Iterator[str]:
    """Why the batch sizes do not suit the layout or, in RL, each other; one reason each."""
    training = config.training
    problem = batch_problem(layout, training.global_batch_size, training.micro_batch_size)
    if problem is not None:
        yield f"training: {problem}"
    yield from config.problems(layout.world_size)
    yield from held_out_problems(config)
    yield from tracker_problems(config)
    if config.optimizer.decay_steps is not None and config.optimizer.schedule != "wsd":
        yield f"optimizer.decay_steps has no effect on schedule={config.optimizer.schedule}; allowed: null, or wsd"


def _check_implementation(config: Config) -> None:
    use_transformer_engine(config.model)
    if config.precision.fp8 is not None and not platform().has_transformer_engine():
        raise UserError(f"precision.fp8={config.precision.fp8} needs Transformer Engine on a GPU; here: fp8=null")


def _check_routers(config: Config, arch: Architecture) -> None:
    moe = config.model.moe
    keys = {"optimizer.router_lr": config.optimizer.router_lr, "model.moe.z_loss_coefficient": moe.z_loss_coefficient}
    for key, value in keys.items():
        if value and arch.moe is None:
            raise UserError(f"{key}={value} has no effect: {config.model.path} has no experts, so no routers")


def _check_adapters(config: Config, arch: Architecture, layout: Layout) -> None:
    if config.lora is None:
        return
    find_adapters(arch, config.lora)
    if config.lora.quantization is not None:
        if config.precision.fp8 is not None:
            raise UserError(
                f"lora.quantization={config.lora.quantization} with precision.fp8={config.precision.fp8}: weights can "
                "be in one of them only; set one to null"
            )
        check_quantization(arch, layout)
