"""LoRA adapters (arXiv 2106.09685) in PEFT's files, and merging them into weights."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_posttrain.checkpoint.hf_files import read_json, write_json
from megatron_posttrain.errors import UserError, nearest

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
NAME = re.compile(rf"{re.escape(PREFIX)}(?P<module>.+)\.lora_(?P<letter>[AB])\.weight")
# What would change the merged weights in a way that plain LoRA does not; the values that mean "off"
OFF: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "target_parameters": (None, []),
    "lora_bias": (False, None),
    "alora_invocation_tokens": (None, []),
}


class Pair(NamedTuple):
    """The change of a weight [out, in] is scaling x B @ A."""

    a: Tensor  # [rank, in]
    b: Tensor  # [out, rank]
    scaling: float


@dataclass
class Adapter:
    """By the base model's module (the weight's name without `.weight`)."""

    pairs: dict[str, Pair]

    def merge(self, module: str, weight: Tensor) -> Tensor:
        """`weight` [out, in] with the adapter's change, rounded as PEFT's `merge_and_unload` rounds on CPU."""
        pair = self.pairs[module]
        half = pair.b.dtype in (torch.float16, torch.bfloat16)
        a, b = (pair.a.float(), pair.b.float()) if half else (pair.a, pair.b)
        change = (b @ a).mul_(pair.scaling)
        return weight.clone().add_(change.to(pair.b.dtype))

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """`UserError` for a module that `shapes` (by name of the weight) does not have, or has otherwise."""
        for module, pair in self.pairs.items():
            name, shape = f"{module}.weight", (pair.b.shape[0], pair.a.shape[1])
            if name not in shapes:
                raise UserError(f"adapter: the model has no tensor '{name}'{nearest(name, shapes)}")
            if shapes[name] != shape:
                raise UserError(f"adapter: '{name}' is {list(shapes[name])}, the adapter is for {list(shape)}")


def read_adapter(directory: Path | str) -> Adapter:
    """A directory with `adapter_config.json` and `adapter_model.safetensors`.

    `UserError` for adapters other than plain LoRA (DoRA, trained biases, replaced modules).
    """
    directory = Path(directory)
    config = read_json(directory / CONFIG)
    for key, allowed in OFF.items():
        if config.get(key, allowed[0]) not in allowed:
            raise UserError(f"{directory / CONFIG}: {key} is {config[key]!r}; supported: {allowed[0]!r}")
    try:
        tensors = load_file(directory / WEIGHTS)
    except FileNotFoundError:
        raise UserError(f"{directory / WEIGHTS}: no such file") from None
    except SafetensorError as error:
        raise UserError(f"{directory / WEIGHTS}: cannot be read ({error})") from None
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = NAME.fullmatch(name)
        if match is None:
            raise UserError(f"{directory / WEIGHTS}: tensor '{name}' is not of a linear layer's LoRA")
        found.setdefault(match["module"], {})[match["letter"]] = tensor
    pairs = {}
    for module, letters in found.items():
        if set(letters) != {"A", "B"}:
            raise UserError(f"{directory / WEIGHTS}: '{module}' has lora_{next(iter(letters))} only")
        pairs[module] = Pair(letters["A"], letters["B"], _scaling(config, module))
    return Adapter(pairs)


def _scaling(config: dict[str, Any], module: str) -> float:
    rank = _matching(config.get("rank_pattern"), module, config["r"])
    alpha = _matching(config.get("alpha_pattern"), module, config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _matching(pattern: dict[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rule: the first key that, as a regular expression, ends the module's name."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def write_adapter(
    directory: Path | str,
    pairs: Iterable[tuple[str, Tensor, Tensor]],
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    base_model: str | None = None,
) -> None:
    """PEFT's files from (module, A [rank, in], B [out, rank]); the change of a weight is alpha / rank x B @ A."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors, targets = {}, set()
    for module, a, b in pairs:
        tensors[f"{PREFIX}{module}.lora_A.weight"] = a.contiguous()
        tensors[f"{PREFIX}{module}.lora_B.weight"] = b.contiguous()
        targets.add(module.rpartition(".")[2])
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": sorted(targets),
        "bias": "none",
        "inference_mode": True,
    }
    write_json(directory / CONFIG, config)
