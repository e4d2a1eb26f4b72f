"""LoRA adapters (arXiv 2106.09685), with or without magnitudes (DoRA), in PEFT's files, and merging them into weights.

Experts that the base directory holds one by one are linear layers like any other: `experts.3.gate_proj.lora_A.weight`,
which vLLM reads, and PEFT as well. Experts in 3-D tensors (transformers 5) are PEFT's `target_parameters`: the A of all
experts one below the other [experts x rank, in], B [out, rank x experts] with the expert as the faster index, gate and
up with one A; `experts.base_layer` is the first such tensor of a layer, `experts` the last. vLLM reads these for
gpt-oss, and for other families where it is told that an adapter is 3-D. A router, which transformers 5 has as a
parameter, is a target parameter too.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_posttrain.checkpoint.hf_files import read_json, write_json
from megatron_posttrain.config.schema import LoraConfig
from megatron_posttrain.errors import UserError, nearest
from megatron_posttrain.models.disk_layout import DiskLayout, Place
from megatron_posttrain.models.modules.lora import scaling

ByTensor = dict[str, dict[str, tuple[Tensor, Tensor]]]  # 3-D tensor on disk -> its part -> (A, B)
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
INNER = ".base_layer"
NAME = re.compile(rf"{re.escape(PREFIX)}(?P<module>.+)\.lora_((?P<letter>[AB])\.weight|magnitude_vector)")
ROUTERS = (".mlp.gate", ".mlp.router")  # modules
# What would change the merged weights in a way that plain LoRA does not; the values that mean "off"
OFF: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "lora_bias": (False, None),
    "alora_invocation_tokens": (None, []),
}


class Pair(NamedTuple):
    """The change of a weight [out, in] is scaling x B @ A; `m`: the norms that its rows then get."""

    a: Tensor  # [rank, in]
    b: Tensor  # [out, rank]
    scaling: float
    m: Tensor | None = None  # [out]


@dataclass
class Adapter:
    """By the base model's module (the weight's name without `.weight`), experts one by one."""

    pairs: dict[str, Pair]

    def merge(self, module: str, weight: Tensor) -> Tensor:
        """`weight` [out, in] with the adapter's change: multiplied and added in fp32, rounded once."""
        pair = self.pairs[module]
        whole = (pair.b.float() @ pair.a.float()).mul_(pair.scaling).add_(weight)
        if pair.m is not None:
            whole *= (pair.m.float() / whole.norm(dim=1))[:, None]
        return whole.to(weight.dtype)

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """`UserError` for a module that `shapes` (by name of the weight) does not have, or has otherwise."""
        for module, pair in self.pairs.items():
            name, shape = f"{module}.weight", (pair.b.shape[0], pair.a.shape[1])
            if name not in shapes:
                raise UserError(f"adapter: the model has no tensor '{name}'{nearest(name, shapes)}")
            if shapes[name] != shape:
                raise UserError(f"adapter: '{name}' is {list(shapes[name])}, the adapter is for {list(shape)}")


def read_adapter(directory: Path | str, fused: DiskLayout | None = None) -> Adapter:
    """A directory with `adapter_config.json` and `adapter_model.safetensors`. `fused`: the model's tensors with its
    experts in 3-D ones, for adapters that are written so. `UserError` for adapters with more (trained biases, replaced
    modules)."""
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
        found.setdefault(match["module"], {})[match["letter"] or "M"] = tensor
    pairs: dict[str, Pair] = {}
    for module, letters in found.items():
        wanted = {"A", "B", "M"} if config.get("use_dora") else {"A", "B"}  # M: the magnitude vector
        if letters.keys() != wanted:
            had, needs = (", ".join(sorted(names)) for names in (letters, wanted))
            raise UserError(f"{directory / WEIGHTS}: '{module}' has {had} only; its adapter has {needs}")
        if config.get("target_parameters") and fused and (held := _held_by(module.removesuffix(INNER), fused)):
            name = held[0 if module.endswith(INNER) else -1]
            pairs |= _split_experts(name, letters["A"], letters["B"], fused, config)
        else:
            pairs[module] = Pair(letters["A"], letters["B"], _scaling(config, module), letters.get("M"))
    return Adapter(pairs)


def _held_by(container: str, fused: DiskLayout) -> list[str]:
    """The 3-D tensors of a layer's experts, in the order of the model, which is that of PEFT's wrappers."""
    return [n for n, shape in fused.shapes.items() if n.rpartition(".")[0] == container and len(shape) == 3]


def _split_experts(name: str, a: Tensor, b: Tensor, fused: DiskLayout, config: dict[str, Any]) -> dict[str, Pair]:
    experts = fused.shapes[name][0]
    if len(a) % experts or b.shape[1] % experts:
        raise UserError(f"adapter: '{name}' has {experts} experts, the adapter is for another number of them")
    a, b, scaling = (
        a.view(experts, -1, a.shape[1]),
        b.view(len(b), -1, experts).permute(2, 0, 1),
        _scaling(config, name),
    )
    return {
        part.removesuffix(".weight"): Pair(a[place.expert], _rows(place).view(b).contiguous(), scaling)
        for part in fused.table_names[name]
        if part.endswith(".weight") and (place := fused.places[part]).expert is not None
    }


def _rows(place: Place) -> Place:
    """The place of a part's rows in a B, whose rows are output features whichever way the weight lies on disk."""
    assert place.fusion is not None
    return place._replace(fusion=replace(place.fusion, transposed=False))


def _scaling(config: dict[str, Any], module: str) -> float:
    def value(patterns: str, default: str) -> Any:
        """By PEFT's rule: of the first key that, as a regular expression, ends the module's name."""
        given = (config.get(patterns) or {}).items()
        return next((of for key, of in given if re.match(rf"(.*\.)?({key})$", module)), config[default])

    rank, alpha = value("rank_pattern", "r"), value("alpha_pattern", "lora_alpha")
    return scaling(alpha, rank, bool(config.get("use_rslora")))


def write_adapter(
    directory: Path | str, pairs: Iterable[tuple[Any, ...]], lora: LoraConfig, base_model: str | None = None,
    layout: DiskLayout | None = None,
) -> None:  # fmt: skip
    """PEFT's files from (module, A [rank, in], B [out, rank], magnitudes [out] or None). `layout`: the tensors of the
    base's directory, whose way of holding experts the adapter follows."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    modules: list[str] = []
    parameters: set[str] = set()
    by_tensor: ByTensor = {}
    for module, a, b, m in pairs:
        place = None if layout is None else layout.places[f"{module}.weight"]
        if place is not None and place.fusion is not None:
            by_tensor.setdefault(place.name, {})[f"{module}.weight"] = (a, b)
            continue
        if module.endswith(ROUTERS):
            parameters.add(f"{module}.weight")
        else:
            modules.append(module)
        if m is not None:
            tensors[f"{PREFIX}{module}.lora_magnitude_vector"] = m.contiguous()
        tensors[f"{PREFIX}{module}.lora_A.weight"] = a.contiguous()
        tensors[f"{PREFIX}{module}.lora_B.weight"] = b.contiguous()
    if layout is not None:
        tensors |= dict(_join_experts(by_tensor, layout))
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    parameters |= by_tensor.keys()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        # PEFT refuses dropout beside target_parameters, and loads to infer
        "lora_dropout": 0.0 if parameters else lora.dropout,
        "use_rslora": lora.use_rslora,
        "use_dora": lora.use_dora,
        "target_modules": _suffixes(modules, [] if layout is None else layout.places),
        "target_parameters": sorted({re.sub(r".*\.layers\.\d+\.", "", name) for name in parameters}) or None,
        "bias": "none",
        "inference_mode": True,
    }
    write_json(directory / CONFIG, config)


def _join_experts(by_tensor: ByTensor, layout: DiskLayout) -> Iterator[tuple[str, Tensor]]:
    """PEFT's tensors of adapters of experts."""
    for name, parts in by_tensor.items():
        container = name.rpartition(".")[0]
        inner = [other for other in _held_by(container, layout) if other in by_tensor]
        module = PREFIX + container + INNER * (len(inner) - 1 - inner.index(name))
        experts, first = layout.shapes[name][0], next(iter(parts.values()))
        fusion = layout.places[next(iter(parts))].fusion
        assert fusion is not None
        (rank, inputs), rows = first[0].shape, len(first[1]) * len(fusion.parts)
        a, b = first[0].new_zeros(experts, rank, inputs), first[1].new_zeros(experts, rows, rank)
        for part, (of_a, of_b) in parts.items():
            place = layout.places[part]
            a[place.expert] = of_a
            _rows(place).view(b).copy_(of_b)
        yield f"{module}.lora_A.weight", a.flatten(0, 1)
        yield f"{module}.lora_B.weight", b.permute(1, 2, 0).flatten(1).contiguous()


def _suffixes(modules: Collection[str], weights: Collection[str]) -> list[str]:
    """The shortest ends of the modules' names that no other linear layer's name has."""

    def ends(module: str) -> list[str]:
        parts = module.split(".")
        return [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]

    others = {name.removesuffix(".weight") for name in weights if name.endswith(".weight")} - set(modules)
    taken = {end for other in others for end in ends(other)}
    return sorted({next(end for end in ends(module) if end not in taken) for module in modules})
