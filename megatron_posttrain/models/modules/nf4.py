"""Weights in NF4 with double quantisation (QLoRA, arXiv 2305.14314, section 3), as bitsandbytes quantises them.

A block of 64 values of a row is scaled by its largest, and each becomes the nearest of 16 quantiles of a normal
distribution (4 bits). The largest values, less their mean over the tensor, are scaled by the largest of 256 of them and
become one of 256 values of a dynamic type (arXiv 2110.02861, section 2; 8 bits): 4 + 8/64 + 32/(64 x 256) bits
a weight.
Blocks are those of the whole Hugging Face tensor under every layout.
"""

import functools
import itertools
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
    """A range of rows and columns of whole tensor number `source`, in a shard of a weight."""

    source: int
    rows: tuple[int, int]
    columns: tuple[int, int]


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

    def store(self, read: Sequence[Callable[[], Tensor]], parts: Sequence[Part]) -> None:
        """Quantises the tensors [out, in] that `read` gives, one in memory at a time; `parts`: what the shard has."""
        stops = [*itertools.accumulate(stop - start for _, (start, stop), _ in parts)]
        groups: list[Tensor] = []
        for source, get in enumerate(read):
            whole = get().to(self.codes.device, self.dtype).float()
            across, start = whole.shape[1] // BLOCK, sum(map(len, groups)) * GROUP
            scaled, largest = _scaled(whole.view(-1, BLOCK))
            mean = largest.mean()
            scales, of_groups = _of_groups(largest - mean)
            groups.append(of_groups)
            for part, stop in zip(parts, stops, strict=True):
                if part.source != source:
                    continue
                rows, columns = slice(*part.rows), slice(*part.columns)
                first, last = (edge // BLOCK for edge in part.columns)
                target = slice(stop - (rows.stop - rows.start), stop)
                found = _nearest(scaled.view(whole.shape)[rows, columns], nf4_code(whole.device))
                self.codes[target] = (found[:, ::2] << 4) | found[:, 1::2]
                self.scales[target] = scales.view(-1, across)[rows, first:last]
                numbers = torch.arange(*part.rows, dtype=torch.int32, device=whole.device)
                self.first[target] = start + numbers * across + first
                self.means[target] = mean
        self.group_scales = torch.cat(groups)

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


def logical_shape(weight: Tensor) -> tuple[int, ...]:
    """Of a parameter, also where it is empty because its values are in NF4."""
    nf4 = getattr(weight, "nf4", None)
    return tuple(weight.shape) if nf4 is None else nf4.shape


def values(weight: Tensor) -> Tensor:
    """Of a parameter, also where they are in NF4."""
    nf4 = getattr(weight, "nf4", None)
    return weight if nf4 is None else nf4.dequantised()


@contextmanager
def quantising_linears(random: bool) -> Iterator[None]:
    """The linear layers of models that are built meanwhile have weights in NF4, each as soon as it is made, so that no
    two are in memory. `random`: with the values that they were made with; else with none, until they are loaded."""

    def made(parent: Any, name: str, layer: Any) -> None:
        if not name.startswith("linear_") or layer is None:
            return
        for weight in layer.parameters(recurse=False):
            if weight.dim() == 2:
                shape = tuple(weight.shape)
                weight.nf4 = Nf4Weight(shape, weight.dtype, weight.device)
                if random:
                    whole = weight.data
                    weight.nf4.store([lambda whole=whole: whole], [Part(0, (0, shape[0]), (0, shape[1]))])
                weight.requires_grad_(False)
                weight.data = weight.data.new_empty(0)

    handle = torch.nn.modules.module.register_module_module_registration_hook(made)
    try:
        yield
    finally:
        handle.remove()


def run_dequantised(module: torch.nn.Module, owners: tuple[type, ...]) -> None:
    """From now on the weights below `module` that are in NF4 have their values while their layer runs forward. Autograd
    keeps their codes instead of them, to make them anew in backward: one layer's values are in memory at a time.
    `owners`: modules that use the weights of the layers in them."""
    whole = isinstance(module, owners)
    weights: list[Any] = [w for w in module.parameters(recurse=whole) if hasattr(w, "nf4")]
    if weights:
        forward = module.forward

        def run(*args: Any, **kwargs: Any) -> Any:
            with dequantised(weights):
                return forward(*args, **kwargs)

        module.forward = run  # type: ignore[method-assign]
    if not whole:
        for child in module.children():
            run_dequantised(child, owners)


@contextmanager
def dequantised(weights: Sequence[Any]) -> Iterator[None]:
    """Meanwhile parameters have their values, which autograd does not keep."""
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
