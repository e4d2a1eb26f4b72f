"""Rotary frequencies of the published scalings, in float32 as the Hugging Face models compute them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_posttrain.models.architecture import Rope


def inverse_frequencies(rope: Rope, dim: int) -> Tensor:
    """[dim / 2] fp32 inverse frequencies of `rope` for rotary dimension `dim`."""
    plain = 1.0 / (rope.base ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim))
    if rope.scaling == "yarn":
        return _yarn(rope, dim)
    if rope.scaling == "llama3":
        return _llama3(rope, plain)
    if rope.scaling == "linear":
        return plain / rope.factor
    return plain


def concentration(rope: Rope) -> float:
    """Factor on cosine and sine (YaRN, Peng et al. 2023, section 3.4); 1 without YaRN."""
    if rope.scaling != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return _mscale(rope.factor, rope.mscale) / _mscale(rope.factor, rope.mscale_all_dim)
    return _mscale(rope.factor, 1.0)


def _mscale(scale: float, weight: float) -> float:
    return 0.1 * weight * math.log(scale) + 1.0 if scale > 1 else 1.0


def _yarn(rope: Rope, dim: int) -> Tensor:
    def rotations_at(count: float) -> float:
        # The dimension that turns `count` times over the original context.
        return dim * math.log(rope.original_max_position / (count * 2 * math.pi)) / (2 * math.log(rope.base))

    low, high = rotations_at(rope.beta_fast), rotations_at(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    positions = rope.base ** (torch.arange(0, dim, 2).float() / dim)
    extrapolated, interpolated = 1.0 / positions, 1.0 / (rope.factor * positions)
    ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    keep = 1 - ramp.clamp(0, 1)
    return interpolated * (1 - keep) + extrapolated * keep


def _llama3(rope: Rope, plain: Tensor) -> Tensor:
    wavelength = 2 * math.pi / plain
    original, low, high = rope.original_max_position, rope.low_freq_factor, rope.high_freq_factor
    smooth = (original / wavelength - low) / (high - low)
    blended = (1 - smooth) * plain / rope.factor + smooth * plain
    scaled = torch.where(wavelength > original / low, plain / rope.factor, plain)
    between = (wavelength <= original / low) & (wavelength >= original / high)
    return torch.where(between, blended, scaled)
