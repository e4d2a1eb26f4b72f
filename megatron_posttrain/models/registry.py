"""Finds the family of a model, and what follows from it: architecture, weight plans, config."""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Iterator, Sequence
from types import ModuleType

from megatron_posttrain.errors import UserError, nearest
from megatron_posttrain.models.architecture import Architecture, HfConfig
from megatron_posttrain.models.layout import Fusion, Layout
from megatron_posttrain.models.weights import TensorPlan, expand

# `model_type` of a config.json -> module of this package
FAMILIES = {
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3",
}


def architecture_from_hf(config: HfConfig) -> Architecture:
    """Reads a config.json. `UserError`, with the list of what is supported, for an unknown model."""
    kind = config.get("model_type")
    if kind not in FAMILIES:
        supported = ", ".join(sorted(FAMILIES))
        hint = nearest(str(kind), FAMILIES)
        raise UserError(f"config.json: model_type {kind!r} is not supported (one of {supported}){hint}")
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method")
        raise UserError(f"config.json: weights quantised with {method!r} cannot be read")
    return _module(FAMILIES[kind]).architecture(config)


def family_of(arch: Architecture) -> ModuleType:
    """The module with `architecture`, `hf_config`, `table` and `FUSIONS`."""
    return _module(FAMILIES[arch.family])


def hf_config(arch: Architecture, source: HfConfig | None = None) -> HfConfig:
    """The config.json of `arch`. Other fields of `source` stay as they are."""
    if source is not None and architecture_from_hf(source) == arch:
        return dict(source)
    return family_of(arch).hf_config(arch, source)


def tensors(arch: Architecture) -> Iterator[TensorPlan]:
    """Every global Megatron tensor, in the order of the model, from the architecture alone."""
    return expand(family_of(arch).table(arch))


def fusions(arch: Architecture) -> Sequence[Fusion]:
    """The family's alternative layout on disk; empty when it has none or the model has no experts."""
    return family_of(arch).FUSIONS if arch.moe is not None else ()


def layout(arch: Architecture, fused: bool = False) -> Layout:
    """The tensors of a Hugging Face directory, with one tensor per expert or the fused ones."""
    only = getattr(family_of(arch), "ALWAYS_FUSED", False)
    return Layout(tensors(arch), fusions(arch) if fused or only else ())


def is_ignored(arch: Architecture, name: str) -> bool:
    """Whether a tensor of a directory is one that models of this family are known to carry for nothing."""
    patterns = [r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"]  # once saved, now computed
    if arch.tied_embeddings:
        patterns.append(r"lm_head\.weight")
    patterns += getattr(family_of(arch), "ignored", lambda arch: [])(arch)
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def parameter_count(arch: Architecture) -> int:
    """All parameters, tied ones counted once."""
    return sum(math.prod(shape) for plan in tensors(arch) for shape in plan.shapes)


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"megatron_posttrain.models.{name}")
