"""Weights in blockwise FP8, as DeepSeek-V3 publishes them (arXiv 2412.19437, section 3.3.2). A weight [out, in] is
e4m3; beside it lies one fp32 scale for each block of 128 x 128, by which the stored values are multiplied
(`weight_scale_inv`)."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from megatron_posttrain.errors import UserError
from megatron_posttrain.models.architecture import HfConfig
from megatron_posttrain.models.weights import Read, Replicated, Shape, TensorPlan

SUFFIX = "_scale_inv"
FIELD = "quantization_config"
BLOCK = 128
DTYPE = torch.float8_e4m3fn
LARGEST = torch.finfo(DTYPE).max
SECTION = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}


def block_size(config: HfConfig) -> tuple[int, int] | None:
    """Rows and columns of a block; None for weights that are not quantised. `UserError` for a quantisation that cannot
    be read."""
    section = config.get(FIELD)
    if not section:
        return None
    method, block = section.get("quant_method"), section.get("weight_block_size")
    if method != "fp8" or not block or section.get("fmt", "e4m3") != "e4m3":
        raise UserError(
            f"config.json: weights quantised with {method!r} cannot be read; "
            "allowed: none, or fp8 (e4m3) with weight_block_size"
        )
    return block[0], block[1]


def scale_shape(shape: Shape, block: tuple[int, int] = (BLOCK, BLOCK)) -> Shape:
    return tuple(-(-size // step) for size, step in zip(shape, block, strict=True))


class BlockScaled:
    """A quantised weight that is sliced by rows or columns; slices are bf16 tensors."""

    def __init__(self, weight: Tensor, scale: Tensor, block: tuple[int, int]) -> None:
        self.weight, self.scale, self.block = weight, scale, block
        self.dtype, self.device, self.shape = torch.bfloat16, weight.device, weight.shape

    def __getitem__(self, index: Any) -> Tensor:
        rows, columns = index if isinstance(index, tuple) else (index, slice(None))
        row = torch.arange(self.weight.shape[0])[rows] // self.block[0]
        column = torch.arange(self.weight.shape[1])[columns] // self.block[1]
        scale = self.scale[row][:, column]
        return scale.mul_(self.weight[rows, columns].float()).to(self.dtype)


def reader(get: Read, names: Collection[str], block: tuple[int, int] | None) -> Read:
    """`get`, with weights that have scales dequantised (to bf16) where they are sliced."""
    if block is None:
        return get

    def read(name: str) -> Any:
        return BlockScaled(get(name), get(name + SUFFIX), block) if name + SUFFIX in names else get(name)

    return read


def is_quantised(plan: TensorPlan) -> bool:
    """Whether `quantise` is for it: linear layers, but not router, embedding, output and MTP projection."""
    mapping = plan.mapping
    matrix = plan.layer is not None and len(mapping.shapes[0]) == 2 and not isinstance(mapping, Replicated)
    return matrix and not mapping.megatron.endswith("eh_proj.weight")


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(e4m3 [out, in], fp32 scales [out / 128, in / 128]): the largest value of a block becomes 448."""
    rows, columns = scale_shape(tuple(weight.shape))
    padded = torch.zeros(rows * BLOCK, columns * BLOCK)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    blocks = padded.view(rows, BLOCK, columns, BLOCK)
    scale = blocks.abs().amax(dim=(1, 3)) / LARGEST
    scale[scale == 0] = 1.0
    blocks.div_(scale[:, None, :, None])
    return padded[: weight.shape[0], : weight.shape[1]].to(DTYPE), scale
