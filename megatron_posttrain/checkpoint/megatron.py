"""Megatron distributed checkpoints of a model's weights: their keys, their files, and reading them."""

import io
import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_posttrain.checkpoint.distcp import (
    ALIGNMENT,
    CHUNK_BYTES,
    DistcpReader,
    Stored,
    StoredChunk,
    archive,
    write_metadata,
)  # fmt: skip
from megatron_posttrain.checkpoint.stream import Item, OutputFile
from megatron_posttrain.errors import UserError
from megatron_posttrain.models import registry
from megatron_posttrain.models.architecture import Architecture
from megatron_posttrain.models.weights import MERGED_NORMS, Read, Shape, TensorPlan, Vocabulary, numbered

SHARD_BYTES = 2_000_000_000
HF_FILES = "hf"  # where the Hugging Face side files lie inside a Megatron directory
PREFIXES = ("", "model.", "module.", "model.module.")
EMBEDDING = "embedding.word_embeddings.weight"


class Key(NamedTuple):
    """A tensor of the weight table in a checkpoint: `key` at index `leading` of dimensions `sizes`."""

    key: str
    leading: Shape = ()
    sizes: Shape = ()


def key_of(plan: TensorPlan, arch: Architecture, layer_axis: bool | None = None) -> Key:
    """Where `GPTModel.sharded_state_dict` of megatron-core 0.16.1 (local layers) puts a tensor. `layer_axis`: all
    layers in one tensor; None: as megatron-core, for models without experts."""
    name = plan.mapping.megatron.replace(".local_experts.*.", ".experts.")
    if arch.mla is None:  # with latent attention the local layers keep the names of their norms
        for ours, merged in MERGED_NORMS[:2]:
            name = name.replace(f"*.{ours}", f"*.{merged}")
    leading: Shape = ()
    sizes: Shape = ()
    layer_axis = arch.moe is None if layer_axis is None else layer_axis
    if layer_axis and name.startswith("decoder.layers.*."):
        assert plan.layer is not None
        name = name.replace("*.", "", 1)
        leading, sizes = (plan.layer,), (arch.num_layers,)
    else:
        name = numbered(name, plan.layer, None)
    if plan.expert is not None:
        leading, sizes = (*leading, plan.expert), (*sizes, plan.mapping.experts or 0)
    return Key(name, leading, sizes)


def other_names(key: str, arch: Architecture) -> list[str]:
    """Under which further names other layer implementations look for it: the bytes are stored once."""
    names = []
    for ours, merged in MERGED_NORMS[1:] if arch.mla is not None else MERGED_NORMS[:2]:
        names += [key.replace(f".{ours}", f".{merged}"), key.replace(f".{merged}", f".{ours}")]
    return [name for name in dict.fromkeys(names) if name != key]


class Planned(NamedTuple):
    """The files of a checkpoint before anything is written, and its catalogue."""

    files: list[OutputFile]
    tensors: dict[str, Stored]
    objects: dict[str, StoredChunk]

    def finish(self, directory: Path) -> None:
        """Writes the catalogue: without it the files are no checkpoint."""
        torch.save({"checkpoint_version": 3.0, "iteration": 0}, directory / "common.pt")
        config = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        config |= {"common_backend": "torch", "common_backend_version": 1}
        (directory / "metadata.json").write_text(json.dumps(config))
        write_metadata(directory, self.tensors, self.objects)


def plan_files(
    arch: Architecture, dtype_of: Callable[..., torch.dtype], read: Read, shard_bytes: int | None
) -> Planned:
    """Every tensor's place in files of about `shard_bytes` (None: 2 GB), and from where its bytes come (`read`)."""
    files: list[OutputFile] = []
    tensors: dict[str, Stored] = {}
    objects: dict[str, StoredChunk] = {}
    state = io.BytesIO()
    torch.save([None], state)  # what layers without a state of their own save; one serves all
    for plan in registry.tensors(arch):
        key, dtype, shape = key_of(plan, arch), dtype_of(plan), plan.local_shape(1)
        stored = tensors.setdefault(key.key, Stored(dtype, key.sizes + shape, []))
        rows = max(1, CHUNK_BYTES // (math.prod(shape[1:]) * dtype.itemsize))
        for start in range(0, shape[0], rows):
            stop = min(start + rows, shape[0])
            chunk = (1,) * len(key.leading) + (stop - start, *shape[1:])
            head, tail = archive(dtype, chunk)
            nbytes = math.prod(chunk) * dtype.itemsize
            if not files or files[-1].nbytes + nbytes > (shard_bytes or SHARD_BYTES):
                files.append(OutputFile(f"__{len(files)}_0.distcp"))
                if len(files) == 1:
                    files[0].add(state.getvalue())
            file = files[-1]
            file.add(b"\0" * (-file.nbytes % ALIGNMENT))
            begin = file.nbytes
            file.add(head)
            file.add(Item(plan.name, dtype, nbytes, partial(plan.rows, read, start, stop)))
            file.add(tail)
            offsets = key.leading + (start,) + (0,) * (len(shape) - 1)
            stored.chunks.append(StoredChunk(offsets, chunk, file.name, begin, file.nbytes - begin))
        for module in _modules(key.key):
            numbers = [".".join(map(str, pair)) for pair in (key.leading or (0,), key.sizes or (1,))]
            place = StoredChunk((), (), files[0].name, 0, len(state.getvalue()))
            objects[f"{module}._extra_state/shard_{'_'.join(numbers)}"] = place
    for key_name in list(tensors):
        tensors |= dict.fromkeys(other_names(key_name, arch), tensors[key_name])
    return Planned(files, tensors, objects)


def _modules(key: str) -> list[str]:
    """The modules that have a state beside the tensor `key`, in one layer implementation or another."""
    module = key.rpartition(".")[0]
    core = [module.replace("linear_proj", "core_attention")] if module.endswith("self_attention.linear_proj") else []
    return [module, *core]


class MegatronReader:
    """The tensors of a model in a distributed checkpoint, ours or a trainer's, by the weight table. `UserError` names
    the first tensor of the model that the checkpoint lacks or has in another shape."""

    def __init__(self, directory: Path | str, arch: Architecture) -> None:
        self.reader, self.arch = DistcpReader(directory), arch
        self.sources: dict[str, tuple[TensorPlan, int]] = {}
        self.keys: dict[str, Key] = {}
        self.prefix = next((prefix for prefix in PREFIXES if prefix + EMBEDDING in self.reader.tensors), "")
        for plan in registry.tensors(arch):
            self.keys[plan.name] = self._find(plan)
            for number, name in enumerate(plan.hf):
                self.sources[name] = (plan, number)

    def _find(self, plan: TensorPlan) -> Key:
        first = key_of(plan, self.arch)
        for wanted in (first, key_of(plan, self.arch, True), key_of(plan, self.arch, False)):
            for name in (wanted.key, *other_names(wanted.key, self.arch)):
                key = wanted._replace(key=self.prefix + name)
                if key.key in self.reader.tensors:
                    self._check(plan, key)
                    return key
        raise UserError(f"{self.reader.directory}: lacks tensor '{first.key}' of this {self.arch.family} model")

    def _check(self, plan: TensorPlan, key: Key) -> None:
        shape, wanted = self.reader.stored(key.key).shape, key.sizes + plan.local_shape(1)
        rows = len(key.sizes)
        padded = isinstance(plan.mapping, Vocabulary) and shape[rows] >= wanted[rows]
        if shape != wanted and not (padded and shape[rows + 1 :] == wanted[rows + 1 :]):
            shapes = f"has shape {list(shape)}, the model's is {list(wanted)}"
            raise UserError(f"{self.reader.directory}: tensor '{key.key}' {shapes}")

    def dtype(self, plan: TensorPlan) -> torch.dtype:
        return self.reader.stored(self.keys[plan.name].key).dtype

    def parts(self, name: str) -> Iterator[Tensor]:
        """The tensor that the weight table calls `name`, as parts, one below the other."""
        plan, source = self.sources[name]
        key = self.keys[plan.name]
        # Without the rows by which tensor parallelism padded the vocabulary
        return plan.parts(self.reader.get(key.key, key.leading)[: plan.local_shape(1)[0]], source)

    def hf_dtype(self, name: str) -> torch.dtype:
        return self.dtype(self.sources[name][0])
