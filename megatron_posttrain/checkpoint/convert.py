"""Hugging Face directories into Megatron distributed checkpoints and back, one tensor in memory at a time."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_posttrain.checkpoint import hf_files, megatron
from megatron_posttrain.checkpoint.hf import check_tensors, directory_layout, model_directory, table_reader
from megatron_posttrain.checkpoint.hf_files import HfReader, read_json, write_json
from megatron_posttrain.checkpoint.lora import WEIGHTS, read_adapter
from megatron_posttrain.checkpoint.stream import Item, OutputFile, StreamOptions, check_target, write_stream
from megatron_posttrain.errors import UserError
from megatron_posttrain.models import fp8, registry
from megatron_posttrain.models.architecture import Architecture, HfConfig
from megatron_posttrain.models.disk_layout import DiskLayout
from megatron_posttrain.models.weights import TensorPlan

FACTS = "conversion.json"  # in a Megatron directory: the layout that its source had
FIXED_BYTES = 500 << 20  # of a process with torch, a catalogue and a piece in conversion


@dataclass(frozen=True)
class ConvertOptions:
    """What the converted checkpoint is to be."""

    # Of its tensors; None: as they are (FP8: bf16). Those that the family keeps in a wider dtype keep theirs.
    dtype: torch.dtype | None = None
    shard_bytes: int | None = None  # of a file; None: 5 GB of safetensors, 2 GB of a distributed checkpoint
    fused: bool | None = None  # experts in one 3-D tensor a layer; None: as in the source
    keep_mtp: bool = True  # multi-token-prediction layers
    custom_code: bool = False  # carry Python files along
    quantize: bool = False  # write linear layers in blockwise FP8 (to Hugging Face)
    adapter: Path | None = None  # PEFT directory whose LoRA is merged (to Hugging Face)
    source: Path | None = None  # with config and side files, for a Megatron checkpoint without its own


@dataclass
class Conversion:
    """A plan: nothing has been written. `arch` is the model, `finish` adds what is not a tensor."""

    arch: Architecture
    files: list[OutputFile]
    inputs: dict[str, Any]  # that have to be the same for a run to be resumed
    finish: Callable[[Path], None]
    bytes_in: int
    left_behind: list[str] = field(default_factory=list)  # Python files that are not carried along

    @property
    def items(self) -> list[Item]:
        return [part for file in self.files for part in file.parts if isinstance(part, Item)]

    @property
    def bytes_out(self) -> int:
        return sum(file.nbytes for file in self.files)

    @property
    def largest(self) -> int:
        """Bytes of the largest tensor, in the wider of source and target."""
        sizes = Counter[str]()
        for item in self.items:
            sizes[item.name] += item.nbytes
        return max(sizes.values())

    def run(self, target: Path, options: StreamOptions) -> int:
        """Collective under torchrun. Returns the bytes that this process wrote."""
        return write_stream(target, self.files, self.inputs, self.finish, options)


def plan_hf_to_megatron(directory: Path, options: ConvertOptions, weights: bool = True) -> Conversion:
    """Checks the source from its headers. `weights=False`: plans from config.json alone, for arithmetic."""
    config = read_json(directory / "config.json" if directory.is_dir() or weights else directory)
    arch = registry.architecture_from_hf(config, keep_mtp=options.keep_mtp)
    if not weights:
        kind, nothing = options.dtype or torch.bfloat16, dict[str, Tensor]().__getitem__
        planned = megatron.plan_files(arch, lambda plan: plan.mapping.dtype or kind, nothing, options.shard_bytes)
        return Conversion(arch, planned.files, {}, planned.finish, _bytes_in(arch, config))
    reader, arch, layout = _checked(directory, arch)
    hf_files.side_file_paths(directory)

    def dtype_of(plan: TensorPlan) -> torch.dtype:
        kinds = {reader.plain_dtype(layout.places[name].name) for name in plan.hf}
        if options.dtype is not None and plan.mapping.dtype is None:
            return options.dtype
        if len(kinds) > 1:
            raise UserError(f"{directory}: {', '.join(plan.hf)} differ in dtype; choose one with --dtype")
        return kinds.pop()

    planned = megatron.plan_files(arch, dtype_of, table_reader(reader, arch), options.shard_bytes)
    side = registry.hf_config(arch, config)

    def finish(partial: Path) -> None:
        target = partial / megatron.HF_FILES
        target.mkdir()
        hf_files.carry_side_files(directory, target, options.custom_code)
        write_json(target / "config.json", _with_dtype(side, options.dtype))
        write_json(partial / FACTS, {"experts": "fused" if layout.fused else "separate"})
        planned.finish(partial)

    inputs = _inputs(directory, reader.files, options)
    return Conversion(arch, planned.files, inputs, finish, reader.nbytes, _left_behind(directory, options))


def _checked(directory: Path, arch: Architecture) -> tuple[HfReader, Architecture, DiskLayout]:
    """A directory's tensors, checked, and its architecture: without multi-token-prediction layers, where the config
    speaks of them and the directory has none."""
    reader, without = HfReader(directory), replace(arch, num_mtp_layers=0)
    extra = set(registry.layout(arch).places) - set(registry.layout(without).places)
    arch = arch if extra & set(reader.names()) else without
    check_tensors(reader, arch)
    return reader, arch, directory_layout(reader, arch)


def _left_behind(directory: Path, options: ConvertOptions) -> list[str]:
    return [] if options.custom_code else hf_files.custom_code(directory)


def _bytes_in(arch: Architecture, config: HfConfig) -> int:
    quantised = fp8.block_size(config) is not None
    total = 0
    for plan in registry.tensors(arch):
        width = 1 if quantised and fp8.is_quantised(plan) else (plan.mapping.dtype or torch.bfloat16).itemsize
        total += sum(math.prod(shape) for shape in plan.shapes) * width
    return total


def _inputs(directory: Path, files: Iterable[Path], options: ConvertOptions) -> dict[str, Any]:
    """What a resumed run has to have in common with the run that it continues."""
    stats = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(files)}
    return {"source": str(directory.resolve()), "source files": stats, "options": repr(options)}


def _with_dtype(config: HfConfig, dtype: torch.dtype | None) -> HfConfig:
    if dtype is None:
        return config
    kept = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}
    return kept | {"dtype": str(dtype).removeprefix("torch.")}


def side_files(directory: Path, source: Path | None) -> Path:
    """The Hugging Face directory with config, tokenizer and template of a Megatron checkpoint. `source`, else the one
    inside the checkpoint, else the model that a trainer's config.yaml names."""
    inside = directory / megatron.HF_FILES
    if source is None:
        source = inside if (inside / "config.json").exists() else _of_run(directory, "model.path")
    if source is None:
        missing = f"{directory}: has no {megatron.HF_FILES}/config.json"
        raise UserError(f"{missing}; name the model's directory with --source")
    if not (source / "config.json").exists():
        raise UserError(f"{source / 'config.json'}: no such file; name the model's directory with --source")
    return source


def _of_run(directory: Path, key: str) -> Path | None:
    """What the config.yaml beside a trainer's checkpoints names; None where there is none, or it names nothing."""
    run_config = directory.resolve().parent.parent / "config.yaml"
    if not run_config.exists():
        return None
    from omegaconf import OmegaConf

    found = OmegaConf.select(OmegaConf.load(run_config), key)
    return None if found is None else model_directory(found, key)


def plan_megatron_to_hf(directory: Path, options: ConvertOptions) -> Conversion:
    """Checks that the checkpoint has every tensor of the model."""
    source = side_files(directory, options.source)
    inside = source == directory / megatron.HF_FILES
    config = read_json(source / "config.json")
    arch = registry.architecture_from_hf(config, keep_mtp=options.keep_mtp and inside)
    reader = megatron.MegatronReader(directory, arch)
    layout = registry.layout(arch, _fused(directory, source, arch, options))
    dtypes = {reader.dtype(plan) for plan in registry.tensors(arch) if plan.mapping.dtype is None}
    common = dtypes.pop() if len(dtypes) == 1 else None
    written = _with_dtype(registry.hf_config(arch, config), options.dtype or common)
    tokenizer = None if options.source or inside else _of_run(directory, "model.tokenizer")
    sources = {directory / chunk.file for stored in reader.reader.tensors.values() for chunk in stored.chunks}
    bytes_in = sum(math.prod(plan.local_shape(1)) * reader.dtype(plan).itemsize for plan in registry.tensors(arch))
    inputs = _inputs(directory, sources, options)
    return _to_hf(arch, reader, layout, written, source, options, inputs, bytes_in, tokenizer)


def plan_merge(base: Path, options: ConvertOptions) -> Conversion:
    """`options.adapter` merged in fp32 into the Hugging Face directory `base`; checks both from their headers."""
    config = read_json(base / "config.json")
    reader, arch, layout = _checked(base, registry.architecture_from_hf(config, keep_mtp=options.keep_mtp))
    assert options.adapter is not None
    inputs = _inputs(base, reader.files | {options.adapter / WEIGHTS}, options)
    written = _with_dtype(registry.hf_config(arch, config), options.dtype)
    return _to_hf(arch, _Parts(reader, arch, layout), layout, written, base, options, inputs, reader.nbytes)


class _Parts:
    """The tensors of a Hugging Face directory, as `MegatronReader` gives those of a checkpoint."""

    def __init__(self, reader: HfReader, arch: Architecture, layout: DiskLayout) -> None:
        self.read, self.reader, self.layout = table_reader(reader, arch), reader, layout

    def hf_dtype(self, name: str) -> torch.dtype:
        return self.reader.plain_dtype(self.layout.places[name].name)

    def parts(self, name: str) -> Iterator[Tensor]:
        yield self.read(name)[:]


def _to_hf(
    arch: Architecture, reader: megatron.MegatronReader | _Parts, layout: DiskLayout, config: HfConfig, source: Path,
    options: ConvertOptions, inputs: dict[str, Any], bytes_in: int, tokenizer: Path | None = None,
) -> Conversion:  # fmt: skip
    """Into a Hugging Face directory with this `config` and the side files of `source` and `tokenizer`."""
    tensors = _planned_tensors(arch, reader, layout, options)
    shapes = {name: planned[:2] for name, planned in tensors.items()}
    targets, headers = hf_files.plan_shards(shapes, options.shard_bytes)
    files = {name: OutputFile(name, [header], len(header)) for name, header in headers.items()}
    for name, target in targets.items():
        files[target.file.name].add(Item(name, target.dtype, target.stop - target.start, tensors[name][2]))
    config = config | ({fp8.FIELD: fp8.SECTION} if options.quantize else {})

    def finish(partial: Path) -> None:
        hf_files.write_side_files(partial, targets, config, source, options.custom_code, tokenizer)

    return Conversion(arch, list(files.values()), inputs, finish, bytes_in, _left_behind(source, options))


def _fused(directory: Path, source: Path, arch: Architecture, options: ConvertOptions) -> bool:
    if options.fused is not None:
        return options.fused
    if (directory / FACTS).exists():
        return bool(read_json(directory / FACTS).get("experts") == "fused")
    return hf_files.has_weights(source) and directory_layout(HfReader(source), arch).fused


Planned = tuple[torch.dtype, tuple[int, ...], Callable[[], Iterable[Tensor]]]


def _planned_tensors(
    arch: Architecture, reader: megatron.MegatronReader | _Parts, layout: DiskLayout, options: ConvertOptions
) -> dict[str, Planned]:
    """The tensors of the Hugging Face side: dtype, shape and where the blocks come from, by name."""
    adapter = None if options.adapter is None else read_adapter(options.adapter, registry.layout(arch, fused=True))
    if adapter is not None:
        adapter.check(registry.shapes(arch))
    quantised: set[str] = set()
    if options.quantize:
        if layout.fused:
            raise UserError("--quantize fp8-block: the format has no fused experts; use --experts separate")
        quantised = {name for plan in registry.tensors(arch) if fp8.is_quantised(plan) for name in plan.hf}

    def parts(name: str) -> Iterator[Tensor]:
        module = name.removesuffix(".weight")
        if adapter is None or module not in adapter.pairs:
            return reader.parts(name)
        return iter([adapter.merge(module, torch.cat(list(reader.parts(name))))])

    def quantise(name: str, which: int) -> list[Tensor]:
        return [fp8.quantise(torch.cat(list(parts(name))))[which]]

    tensors: dict[str, Planned] = {}
    for name, shape in layout.shapes.items():
        part = layout.table_names[name][0]
        if part in quantised:
            tensors[name] = (fp8.DTYPE, shape, partial(quantise, part, 0))
            tensors[name + fp8.SUFFIX] = (torch.float32, fp8.scale_shape(shape), partial(quantise, part, 1))
            continue
        wanted = None if name in layout.dtypes else options.dtype
        tensors[name] = (wanted or reader.hf_dtype(part), shape, partial(layout.blocks, name, parts))
    return tensors


def check_paths(source: Path, target: Path, overwrite: bool) -> None:
    """`UserError` when the target is in use or is the source."""
    if source.resolve() == target.resolve():
        raise UserError(f"{target}: is the source as well")
    check_target(target, overwrite)
