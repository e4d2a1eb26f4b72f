"""Transformer Engine 2.11's compiled kernels (`transformer_engine_torch`) as torch formulas on CPU.

Only those that training calls; any other name is there, so that Transformer Engine's Python imports, and says that it
has no stand-in when it is called. Figures are what the formulas give: this shows that its modules are given the right
weights, shapes and options, not how its kernels round.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.te.attention import *  # noqa: F403

FP8_MAX = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}


class DType(enum.IntEnum):
    kByte = 0
    kInt32 = 2
    kFloat32 = 4
    kFloat16 = 5
    kBFloat16 = 6
    kFloat8E4M3 = 7
    kFloat8E5M2 = 8
    kFloat4E2M1 = 10


TORCH = {
    DType.kByte: torch.uint8,
    DType.kInt32: torch.int32,
    DType.kFloat32: torch.float32,
    DType.kFloat16: torch.float16,
    DType.kBFloat16: torch.bfloat16,
    DType.kFloat8E4M3: torch.float8_e4m3fn,
    DType.kFloat8E5M2: torch.float8_e5m2,
}


class Float8BlockScaleTensorFormat(enum.IntEnum):
    GEMM_READY = 0
    COMPACT = 1


class FP8FwdTensors(enum.IntEnum):
    GEMM1_INPUT = 0
    GEMM1_WEIGHT = 1
    GEMM1_OUTPUT = 2
    GEMM2_INPUT = 3
    GEMM2_WEIGHT = 4
    GEMM2_OUTPUT = 5
    GEMM3_INPUT = 6
    GEMM3_WEIGHT = 7
    GEMM3_OUTPUT = 8


class FP8BwdTensors(enum.IntEnum):
    GRAD_OUTPUT1 = 0
    GRAD_INPUT1 = 1
    GRAD_OUTPUT2 = 2
    GRAD_INPUT2 = 3
    GRAD_OUTPUT3 = 4
    GRAD_INPUT3 = 5


class _Name:
    """A name of the extension that is not one of the stand-ins: an enumeration, its value, a class or a kernel."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> _Name:
        if name.startswith("__"):
            raise AttributeError(name)
        value = _Name(f"{self._name}.{name}")
        setattr(self, name, value)
        return value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"transformer_engine_torch.{self._name} has no stand-in on CPU")


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    value = globals()[name] = _Name(name)
    return value


def get_cublasLt_version() -> int:
    return 130000


def get_cudnn_version() -> int:
    return 92000


def get_num_cublas_streams() -> int:
    return 1


def get_stream_priority_range() -> tuple[int, int]:
    return 0, 0


# Matrix products. Matrices are column-major in cuBLAS: "TN" of A [n, k] and B [m, k] is B A^T, [m, n].


def generic_gemm(
    a: Any, transa: bool, b: Any, transb: bool, out: Tensor | None, quantizer: Any, out_dtype: DType | None,
    bias: Tensor | None, bias_dtype: DType, gelu: bool, gelu_in: Any, grad: bool, workspace: Tensor, size: int,
    accumulate: bool, split_accumulator: bool, *, comm_overlap: Any = None, comm_type: Any = None,
    extra_output: Any = None, bulk_overlap: bool = False, alpha: float = 1.0, beta: float | None = None,
) -> tuple[Any, Tensor | None, None, None]:  # fmt: skip
    assert not gelu
    assert comm_overlap is None
    left = _wide(b, columnwise=transb).flatten(0, -2)
    right = _wide(a, columnwise=not transa).flatten(0, -2)
    product = alpha * ((left.T if transb else left) @ (right.T if transa else right))
    bias_gradient = None
    if bias is not None and bias.numel():
        if grad:
            bias_gradient = left.sum(0).to(bias.dtype)  # of the weight gradient's product: B is the output's gradient
        else:
            product = product + bias.float()
    dtype = TORCH[out_dtype] if out_dtype is not None else (b.dtype if out is None else out.dtype)
    if out is None:
        shape = product.shape if transb else (*b.shape[:-1], product.shape[-1])
        out = product.to(dtype).view(shape)
    elif accumulate:
        out.add_(product.view(out.shape))
    else:
        out.copy_(product.view(out.shape))
    return (quantize(out, quantizer) if quantizer is not None else out), bias_gradient, None, None


def te_general_grouped_gemm(
    a: list[Any], transa: bool, b: list[Any], transb: bool, out: list[Tensor], out_dtype: DType, m_splits: Any,
    bias: list[Tensor], bias_dtype: DType, single_output: bool, gelu_in: Any, grad: bool, workspaces: Any, size: int,
    accumulate: bool, split_accumulator: bool, sm_count: int,
) -> list[Tensor]:  # fmt: skip
    outs = list(out[0].split(m_splits)) if single_output else out
    gradients = []
    for i in range(len(a)):
        _, gradient, _, _ = generic_gemm(
            a[i], transa, b[i], transb, outs[i], None, None, bias[i], bias_dtype, False, None, grad, workspaces[0],
            size, accumulate, split_accumulator,
        )  # fmt: skip
        if gradient is not None:
            bias[i].copy_(gradient)
        gradients.append(bias[i])
    return gradients


# FP8: scales as the recipes say, values rounded by torch.


def _wide(tensor: Any, columnwise: bool) -> Tensor:
    """fp32 [..., k]; of a quantised tensor, what the product would read: its rows or its columns."""
    if not hasattr(tensor, "_quantizer"):
        return tensor.float()
    if hasattr(tensor, "_columnwise_scale_inv"):
        return _wide_blocks(tensor, columnwise)
    if tensor._data is None:
        return (tensor._transpose.view(TORCH[tensor._fp8_dtype]).float() * tensor._scale_inv).movedim(0, -1)
    return tensor._data.view(TORCH[tensor._fp8_dtype]).float() * tensor._scale_inv


def quantize(tensor: Tensor, quantizer: Any, output: Any = None, noop: Tensor | None = None) -> Any:
    out = quantizer.make_empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) if output is None else output
    if hasattr(quantizer, "block_len"):
        return _quantize_blocks(tensor, quantizer, out)
    dtype = TORCH[quantizer.dtype]
    amax = tensor.abs().amax().float() if tensor.numel() else torch.zeros(())  # an expert may have no token
    if hasattr(quantizer, "force_pow_2_scales"):  # current scaling
        if quantizer.with_amax_reduction:  # sequence parallelism gathers values, not scales
            dist.all_reduce(amax, dist.ReduceOp.MAX, group=quantizer.amax_reduction_group)
        scale = torch.where(amax > 0, FP8_MAX[dtype] / amax, torch.ones(()))
        quantizer.scale.fill_(scale)
    else:
        quantizer.amax.copy_(torch.maximum(quantizer.amax, amax))
        scale = quantizer.scale
    data = (tensor.float() * scale).clamp(-FP8_MAX[dtype], FP8_MAX[dtype]).to(dtype).view(torch.uint8)
    if out._data is not None:
        out._data.copy_(data)
    out._scale_inv.copy_(1 / scale)
    if out._transpose is not None:
        out._transpose.copy_(data.movedim(-1, 0))
    out._transpose_invalid = out._transpose is None
    return out


def dequantize(tensor: Any, dtype: DType) -> Tensor:
    return _wide(tensor, columnwise=False).to(TORCH[dtype])


def split_quantize(tensor: Tensor, splits: Sequence[int], quantizers: Sequence[Any]) -> list[Any]:
    return [quantize(part, q) for part, q in zip(tensor.split(list(splits)), quantizers, strict=True)]


def bgrad_quantize(tensor: Tensor, quantizer: Any) -> tuple[Tensor, Any]:
    return tensor.sum(0), quantize(tensor, quantizer)


def fp8_transpose(data: Tensor, dtype: DType, *, out: Tensor | None = None) -> Tensor:
    moved = data.flatten(0, -2).T.contiguous().view(data.shape[-1], *data.shape[:-1])
    return moved if out is None else out.copy_(moved)


def fused_amax_and_scale_update_after_reduction(
    amaxes: Tensor, histories: list[Tensor], scales: list[Tensor], algorithm: str, dtype: DType, margin: float
) -> None:
    """Delayed scaling: the next step's scale is from the largest value of the history (arXiv 2209.05433)."""
    offset = 0
    for history, scale in zip(histories, scales, strict=True):
        now = amaxes[offset : offset + scale.numel()]
        offset += scale.numel()
        history[0].copy_(now)
        amax = history.amax(0) if algorithm == "max" else history[0].clone()
        history.copy_(history.roll(-1, 0))
        history[0].zero_()
        fresh = FP8_MAX[TORCH[dtype]] / amax / 2**margin
        scale.copy_(torch.where((amax > 0) & torch.isfinite(amax), fresh, scale))


def _quantize_blocks(tensor: Tensor, quantizer: Any, out: Any) -> Any:
    """Scales of 128 values of a row, of 128 x 128 for weights; powers of two (DeepSeek-V3, arXiv 2412.19437, 3.3)."""
    dtype, size, height = TORCH[quantizer.dtype], quantizer.block_len, quantizer.block_len
    if quantizer.block_scaling_dim == 1:
        height = 1
    rows = tensor.flatten(0, -2).float()
    for x, data, scales in (
        (rows, out._rowwise_data, out._rowwise_scale_inv),
        (rows.T, out._columnwise_data, out._columnwise_scale_inv),
    ):
        if data is None:
            continue
        tall, wide = -(-x.shape[0] // height), -(-x.shape[1] // size)
        padded = torch.nn.functional.pad(x, (0, wide * size - x.shape[1], 0, tall * height - x.shape[0]))
        blocks = padded.view(tall, height, wide, size).transpose(1, 2)
        amax = blocks.abs().amax((-1, -2))
        inverse = torch.where(amax > 0, torch.exp2(torch.ceil(torch.log2(amax / FP8_MAX[dtype]))), torch.ones(()))
        values = (blocks / inverse[..., None, None]).to(dtype).view(torch.uint8)
        values = values.transpose(1, 2).reshape(padded.shape)[: x.shape[0], : x.shape[1]]
        # What sequence parallelism gathers first lies as the tensor does; else as the product wants it.
        compact = height == 1 and quantizer.all_gather_usage
        if compact and data is out._columnwise_data:
            values, inverse = values.T, inverse.T
        data.view(values.shape).copy_(values)
        kept = inverse if compact or height > 1 else inverse.T
        scales.zero_()[: kept.shape[0], : kept.shape[1]] = kept
    return out


def _wide_blocks(tensor: Any, columnwise: bool) -> Tensor:
    size = tensor._quantizer.block_len
    data = tensor._columnwise_data if columnwise else tensor._rowwise_data
    scales = tensor._columnwise_scale_inv if columnwise else tensor._rowwise_scale_inv
    x = (data.flatten(1) if columnwise else data.flatten(0, -2)).view(TORCH[tensor._fp8_dtype]).float()
    if tensor._is_2D_scaled:
        scales = scales.repeat_interleave(size, 0)[: x.shape[0]].repeat_interleave(size, 1)[:, : x.shape[1]]
    else:
        scales = scales[:, : x.shape[0]].T.repeat_interleave(size, 1)[:, : x.shape[1]]
    x = x * scales
    return x.T if columnwise else x.view(data.shape)


def fused_multi_row_padding(x: Tensor, out: Tensor, splits: Sequence[int], padded: Sequence[int]) -> None:
    """Rows of every expert, filled up with zeros."""
    out.zero_()
    for source, target in zip(x.split(splits), out.split(padded), strict=True):
        target[: len(source)] = source


def fused_multi_row_unpadding(x: Tensor, out: Tensor, padded: Sequence[int], splits: Sequence[int]) -> None:
    for source, target in zip(x.split(padded), out.split(splits), strict=True):
        target.copy_(source[: len(target)])


# Norms and rotary embedding


def rmsnorm_fwd(
    x: Tensor, weight: Tensor, eps: float, out: Any, quantizer: Any, dtype: DType, margin: int, zero_centered: bool
) -> tuple[Any, None, Tensor]:
    rsigma = torch.rsqrt(x.float().square().mean(-1) + eps)
    gamma = weight.float() + (1.0 if zero_centered else 0.0)
    y = (x.float() * rsigma[:, None] * gamma).to(TORCH[dtype])
    if quantizer is not None:
        return quantize(y, quantizer, out), None, rsigma
    return (y if out is None else out.copy_(y)), None, rsigma


def rmsnorm_bwd(
    dy: Tensor, x: Tensor, rsigma: Tensor, weight: Tensor, margin: int, zero_centered: bool
) -> tuple[Tensor, Tensor]:
    normed = x.float() * rsigma[:, None]
    gamma = weight.float() + (1.0 if zero_centered else 0.0)
    scaled = dy.float() * gamma
    dx = rsigma[:, None] * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    return dx.to(x.dtype), (dy.float() * normed).sum(0).to(weight.dtype)


def _rotate(t: Tensor, freqs: Tensor, cu_seqlens: Tensor, cp_size: int, cp_rank: int, sign: float) -> Tensor:
    """t [tokens, heads, d], each sequence's positions from zero; under context parallelism a rank has the
    `cp_rank`-th part from the front and from the back."""
    positions = []
    for length in (cu_seqlens // cp_size).diff().tolist():
        if cp_size == 1:
            positions.append(torch.arange(length))
            continue
        half, full = length // 2, length * cp_size
        positions.append(torch.arange(cp_rank * half, (cp_rank + 1) * half))
        positions.append(torch.arange(full - (cp_rank + 1) * half, full - cp_rank * half))
    angles = freqs[torch.cat(positions)].view(-1, 1, freqs.shape[-1])
    width = angles.shape[-1]
    turned, rest = t[: len(angles), :, :width].float(), t[..., width:]
    first, second = turned.chunk(2, -1)
    half_turn = torch.cat((-second, first), -1)
    rotated = turned * angles.cos() + sign * half_turn * angles.sin()
    padding = t[len(angles) :, :, :width]
    return torch.cat((torch.cat((rotated.to(t.dtype), padding)), rest), -1)


def fused_rope_forward(
    t: Tensor, freqs: Tensor, start: Any, fmt: Any, interleaved: bool, cu_seqlens: Tensor, cp_size: int, cp_rank: int
) -> Tensor:
    assert not interleaved
    return _rotate(t, freqs, cu_seqlens, cp_size, cp_rank, 1.0)


def fused_rope_backward(
    t: Tensor, freqs: Tensor, start: Any, fmt: Any, interleaved: bool, cu_seqlens: Tensor, cp_size: int, cp_rank: int
) -> Tensor:
    return _rotate(t, freqs, cu_seqlens, cp_size, cp_rank, -1.0)


# Attention without a fused kernel: Transformer Engine's own formula over rows of one length.


def convert_thd_to_bshd(tensor: Tensor, cu_seqlens: Tensor, batch: int, longest: int) -> Tensor:
    out = tensor.new_zeros(batch, longest, *tensor.shape[1:])
    for i, (start, end) in enumerate(zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)):
        out[i, : end - start] = tensor[start:end]
    return out


def convert_bshd_to_thd(tensor: Tensor, cu_seqlens: Tensor, tokens: int) -> Tensor:
    out = tensor.new_zeros(tokens, *tensor.shape[2:])
    for i, (start, end) in enumerate(zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)):
        out[start:end] = tensor[i, : end - start]
    return out


# Optimizer


def multi_tensor_scale(chunk: int, noop: Tensor, lists: list[list[Tensor]], scale: float) -> None:
    for source, out in zip(*lists, strict=True):
        out.copy_(source * scale)


def multi_tensor_l2norm(chunk: int, noop: Tensor, lists: list[list[Tensor]], per_tensor: bool) -> Any:
    norms = torch.stack([t.float().norm() for t in lists[0]])
    return norms.norm()[None], norms if per_tensor else torch.empty(0)


def multi_tensor_adam(
    chunk: int, noop: Tensor, lists: list[list[Tensor]], lr: float, beta1: float, beta2: float, eps: float, step: int,
    mode: int, bias_correction: int, decay: float,
) -> None:  # fmt: skip
    """AdamW (arXiv 1711.05101) for mode 1."""
    assert mode == 1
    correct1, correct2 = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1.0, 1.0)
    for gradient, parameter, mean, square in zip(*lists, strict=True):
        mean.mul_(beta1).add_(gradient, alpha=1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        update = (mean / correct1) / ((square / correct2).sqrt() + eps) + decay * parameter
        parameter.sub_(lr * update)
