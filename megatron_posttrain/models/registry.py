"""Finds the family of a model, and what follows from it: architecture, weight plans, config."""

import math
import re
from dataclasses import replace
from functools import lru_cache

from megatron_posttrain.errors import UserError, nearest
from megatron_posttrain.models import deepseek_v3, fp8, gpt_oss, llama, mixtral, qwen
from megatron_posttrain.models.architecture import Architecture, HfConfig
from megatron_posttrain.models.config_keys import check_keys
from megatron_posttrain.models.disk_layout import DiskLayout
from megatron_posttrain.models.weights import Mapping, Shape, TensorPlan, expand

# `model_type` of a config.json -> module with `architecture`, `table` and `FUSIONS`
FAMILIES = {
    "deepseek_v3": deepseek_v3, "gpt_oss": gpt_oss, "llama": llama, "mistral": llama, "mixtral": mixtral,
    "qwen2": qwen, "qwen2_moe": qwen, "qwen3": qwen, "qwen3_moe": qwen,
}  # fmt: skip


CLASSIFIER = "ForSequenceClassification"  # how names of reward models' classes end


def architecture_from_hf(config: HfConfig, keep_mtp: bool = False) -> Architecture:
    """Reads a config.json. `UserError`, with the list of what is supported, for an unknown model.
    Multi-token-prediction layers are dropped unless `keep_mtp`: no loss of ours trains them."""
    kind = config.get("model_type")
    if kind not in FAMILIES:
        supported = ", ".join(sorted(FAMILIES))
        hint = nearest(str(kind), FAMILIES)
        raise UserError(f"config.json: model_type {kind!r} is not supported (one of {supported}){hint}")
    check_keys(config)
    arch = FAMILIES[kind].architecture(config)
    if (token := config.get("pad_token_id")) is not None and -arch.vocab_size <= token < arch.vocab_size:
        arch = replace(arch, padding_token=token % arch.vocab_size)
    if (moe := arch.moe) is not None and not 0 < moe.top_k <= moe.num_experts:
        raise UserError(f"config.json: num_experts_per_tok is {moe.top_k}; allowed: 1 to its {moe.num_experts} experts")
    if any(str(name).endswith(CLASSIFIER) for name in config.get("architectures") or []):
        if len(labels := config.get("id2label") or {0: "", 1: ""}) != 1:
            raise UserError(f"config.json: a classifier of {len(labels)} labels (id2label); supported: 1, a reward")
        arch = arch.with_scalar_head()
    return arch if keep_mtp else replace(arch, num_mtp_layers=0)


def hf_config(arch: Architecture, source: HfConfig) -> HfConfig:
    """The config.json of `arch` in plain weights, which was read from `source`: all of it but the layers that were
    dropped, the quantisation, or the head that is another."""
    config = {key: value for key, value in source.items() if key != fp8.FIELD}
    config |= {name: arch.num_mtp_layers for name in deepseek_v3.MTP_COUNTS if source.get(name)}
    if arch.scalar_head:
        names = [re.sub("ForCausalLM$", CLASSIFIER, name) for name in source.get("architectures") or []]
        config |= {"architectures": names, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    return config


def table(arch: Architecture) -> list[Mapping]:
    """The family's weight table: a row for all layers (and experts) that have it."""
    return FAMILIES[arch.family].table(arch)


@lru_cache(maxsize=4)
def tensors(arch: Architecture) -> tuple[TensorPlan, ...]:
    """Every global Megatron tensor, in the order of the model, from the architecture alone."""
    return tuple(expand(table(arch)))


@lru_cache(maxsize=4)
def layout(arch: Architecture, fused: bool = False) -> DiskLayout:
    """The tensors of a Hugging Face directory, with one tensor per expert or the fused ones."""
    family = FAMILIES[arch.family]
    return DiskLayout(tensors(arch), family.FUSIONS if fused or getattr(family, "ALWAYS_FUSED", False) else ())


def shapes(arch: Architecture) -> dict[str, Shape]:
    """Of the Hugging Face tensors in the weight table, experts one by one, by name."""
    return {name: shape for plan in tensors(arch) for name, shape in zip(plan.hf, plan.shapes, strict=True)}


def is_ignored(arch: Architecture, name: str) -> bool:
    """Whether a tensor of a directory is one that models of this family are known to carry for nothing."""
    patterns = [r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"]  # once saved, now computed
    if arch.tied_embeddings or arch.scalar_head:
        patterns.append(r"lm_head\.weight")
    patterns += getattr(FAMILIES[arch.family], "ignored", lambda arch: [])(arch)
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def parameter_count(arch: Architecture) -> int:
    """All parameters, tied ones counted once."""
    return sum(math.prod(shape) for shape in shapes(arch).values())
