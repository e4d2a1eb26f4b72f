"""Rotary frequencies of the published scalings, in float32 as the Hugging Face models compute them: by their code."""

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_posttrain.models.architecture import Rope
from megatron_posttrain.models.common import ROPE_SCALINGS


def inverse_frequencies(rope: Rope, dim: int) -> Tensor:
    """[dim / 2] fp32 inverse frequencies of `rope` for rotary dimension `dim`."""
    return _frequencies(rope, dim)[0]


def concentration(rope: Rope) -> float:
    """Factor on cosine and sine (YaRN, Peng et al. 2023, section 3.4); 1 without YaRN."""
    return _frequencies(rope, 64)[1]


def _frequencies(rope: Rope, dim: int) -> tuple[Tensor, float]:
    kind = rope.scaling or "linear"  # by a factor of 1
    names = [name for name in ROPE_SCALINGS[kind] if rope.mscale_all_dim or not name.startswith("mscale")]
    values = {name: getattr(rope, name) for name in names if getattr(rope, name) is not None}
    if original := rope.original_max_position:
        values["original_max_position_embeddings"] = original
    parameters = {"rope_type": kind, "rope_theta": rope.base} | values
    sizes = {"head_dim": dim, "hidden_size": dim, "num_attention_heads": 1}
    longest = round(rope.factor * original)
    config = PreTrainedConfig(**sizes, max_position_embeddings=longest, rope_parameters=parameters)
    return ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
