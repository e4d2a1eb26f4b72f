"""Weights in NF4 with double quantisation (QLoRA, arXiv 2305.14314, section 3), as bitsandbytes quantises them.

A block of 64 values of a row is scaled by its largest, and each value becomes the nearest of 16 quantiles of a normal
distribution (4 bits). The largest values, less their mean over the tensor, are scaled by the largest of 256 of them and
become one of 256 values of a dynamic type (arXiv 2110.02861, section 2; 8 bits): 4 + 8/64 + 32/(64 x 256) bits a weight.
Blocks are those of the whole Hugging Face tensor under every layout.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

BLOCK = 64  # values
GROUP = 256  # blocks
# Quantiles of N(0, 1), scaled to [-1, 1], zero exactly (appendix E)
CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@functools.cache
def nf4_code(device: torch.device) -> Tensor:
    return torch.tensor(CODE, device=device)


@functools.cache
def _bytes_to_values(device: torch.device) -> Tensor:
    """[256, 2]: the two values of a byte, the first in its upper half."""
    code, byte = nf4_code(device), torch.arange(256, device=device)
    return torch.stack([code[byte >> 4], code[byte & 15]], dim=1)


@functools.cache
def dynamic_code(device: torch.device) -> Tensor:
    """[256], ascending: +-10^-e x a fraction whose precision grows as e falls from 6 to 0; zero and one."""
    values = [0.0, 1.0]
    for bits in range(7):
        edges = torch.linspace(0.1, 1, 2**bits + 1)
        scaled = 10.0 ** (bits - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [*scaled.tolist(), *(-scaled).tolist()]
    return torch.tensor(sorted(values), device=device)


def _nearest(values: Tensor, code: Tensor) -> Tensor:
    """uint8: which of the ascending `code` is the nearest."""
    return torch.bucketize(values, (code[:-1] + code[1:]) / 2, out_int32=True).to(torch.uint8)


def _scaled(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [n, width], each divided by its largest absolute value, and these [n]."""
    largest = rows.abs().amax(dim=1)
    return (rows * (1.0 / largest.clamp(min=1e-38))[:, None]).clamp_(-1, 1), largest


class Part(NamedTuple):
    """A range of rows and columns of a whole tensor, in a shard of a weight."""

    read: Callable[[], Tensor]  # the whole tensor [out, in]
    rows: slice
    columns: slice


class Nf4Weight:
    """A shard [out, in] of a weight, of one or several whole tensors one below the other."""

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        """Memory for the shard; `store` fills it."""
        out, blocks = shape[0], shape[1] // BLOCK
        self.shape, self.dtype = shape, dtype
        self.codes = torch.zeros(out, shape[1] // 2, dtype=torch.uint8, device=device)
        self.scales = torch.zeros(out, blocks, dtype=torch.uint8, device=device)  # of blocks
        self.group_scales = torch.zeros(0, device=device)  # of groups of blocks, of the whole tensors
        self.first = torch.zeros(out, dtype=torch.int32, device=device)  # number of a row's first block among them
        self.means = torch.zeros(out, device=device)  # of the whole tensor's scales

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.codes, self.scales, self.group_scales, self.first, self.means))

    def store(self, parts: Sequence[Part]) -> None:
        """Quantises, a whole tensor in memory at a time."""
        position, known = 0, {}
        groups: list[Tensor] = []
        for part in parts:
            whole = part.read().to(self.dtype).float()
            count = len(range(*part.rows.indices(len(whole))))
            target, across = slice(position, position + count), whole.shape[1] // BLOCK
            position += count
            scaled, largest = _scaled(whole.view(-1, BLOCK))
            if part.read not in known:
                mean = largest.mean()
                known[part.read] = sum(map(len, groups)) * GROUP, mean, *_of_groups(largest - mean)
                groups.append(known[part.read][3])
            start, mean, codes, _ = known[part.read]
            columns = part.columns.indices(whole.shape[1])
            blocks = slice(columns[0] // BLOCK, columns[1] // BLOCK)
            quantised = _nearest(scaled.view(whole.shape)[part.rows, part.columns], nf4_code(whole.device))
            self.codes[target] = (quantised[:, ::2] << 4) | quantised[:, 1::2]
            self.scales[target] = codes.view(-1, across)[part.rows, blocks]
            rows = torch.arange(*part.rows.indices(len(whole)), device=whole.device)
            self.first[target] = (start + rows * across + blocks.start).int()
            self.means[target] = mean
        self.group_scales = torch.cat(groups).to(self.codes.device)

    def dequantised(self) -> Tensor:
        """[out, in] in the model's dtype."""
        device = self.codes.device
        blocks = torch.arange(self.scales.shape[1], dtype=torch.int32, device=device)
        group_scales = self.group_scales[(self.first[:, None] + blocks) // GROUP]
        scales = dynamic_code(device)[self.scales.int()] * group_scales + self.means[:, None]
        values = _bytes_to_values(device)[self.codes.int()].view(*self.scales.shape, BLOCK)
        return (values * scales[:, :, None]).view(self.shape).to(self.dtype)


def _of_groups(scales: Tensor) -> tuple[Tensor, Tensor]:
    """8-bit codes [n] of the blocks' scales, and the scales of their groups [n / 256]."""
    padded = torch.nn.functional.pad(scales, (0, -len(scales) % GROUP))
    scaled, largest = _scaled(padded.view(-1, GROUP))
    return _nearest(scaled.flatten(), dynamic_code(scales.device))[: len(scales)], largest


def quantised(weights: Sequence[Any]) -> list[Any]:
    """Those whose values are in NF4: parameters that are empty but while their layer runs."""
    return [weight for weight in weights if getattr(weight, "nf4", None) is not None]


def run_dequantised(module: Any, weights: Sequence[Any]) -> None:
    """From now on `weights` have their values while `module` runs forward, and autograd keeps their codes instead of
    them, to make them anew in backward: one layer's values are in memory at a time."""
    forward = module.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        with dequantised(weights):
            return forward(*args, **kwargs)

    module.forward = run


@contextmanager
def dequantised(weights: Sequence[Any]) -> Iterator[None]:
    storages: dict[int, Any] = {}
    for weight in weights:
        weight.data = weight.nf4.dequantised()
        storages[weight.untyped_storage().data_ptr()] = weight

    def pack(tensor: Tensor) -> Any:
        weight = storages.get(tensor.untyped_storage().data_ptr())
        return tensor if weight is None else (weight, tensor.size(), tensor.stride(), tensor.storage_offset())

    def unpack(saved: Any) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        weight, *view = saved
        return weight.nf4.dequantised().as_strided(*view)

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        for weight in weights:
            weight.data = weight.data.new_empty(0)


def is_divisible(columns: int, size: int) -> bool:
    """Whether rows of so many values split in blocks on each of `size` ranks."""
    return columns % (BLOCK * size) == 0


def bits_per_weight() -> float:
    return 4 + 8 / BLOCK + 32 / (BLOCK * GROUP)


assert math.isclose(bits_per_weight(), 4.127, abs_tol=1e-3)
