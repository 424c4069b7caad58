"""The compiled part of the CPU backend, `_native.c`: what surrounds an integer product, one pass each.

Installing the package compiles it where there is a C compiler and Python's headers. Without it (`is_built`), and while
`torch.compile` traces, `kernels.cpu` and `kernels.cpu_activation` do the same with tensor operations, each of which
passes over memory once.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from enum import IntEnum
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.conv import ConvGeometry
from kernels.differences import Held
from kernels.errors import KernelError
from kernels.norms import GroupNorm

if TYPE_CHECKING:
    from kernels.cpu_activation import CpuGrid

_native: ModuleType | None
try:
    from kernels import _native
except ImportError:
    _native = None

# Output channels, and input channels, that the product of `_native.c` takes at a time.
LANES, QUAD = 16, 4
_FLOATS = (torch.float32, torch.bfloat16)
# Elements below which a thread more costs more than it saves.
_THREAD = 1 << 15
# A Linear, as a convolution.
POINT = ConvGeometry((1, 1))


def is_built() -> bool:
    """Whether the compiled part is there."""
    return _native is not None


def is_usable() -> bool:
    """Whether it is there, and no compiler traces."""
    return is_built() and not torch.compiler.is_compiling()


def quantize(
    x: Tensor,
    step: Tensor,
    zero_point: Tensor,
    bits: int,
    *,
    with_sums: bool,
    padding: tuple[int, int],
    norm: GroupNorm | None,
    silu: bool,
    held: Held | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Quantize to codes round(y / step) + zero_point in [0, 2**bits), y being x, group_norm(x) or its SiLU.

    Parameters
    ----------
    x : Tensor, shape (..., C), floating dtype
        (B, H, W, C) if there is padding or a norm.
    step : Tensor, shape (R, ..., 1) or (R, ..., C), dtype float32
        Of each of R equal runs of rows.
    zero_point : Tensor, shape (R,), dtype int32
        Unsigned.
    bits : int
        8 at most.
    with_sums : bool
    padding : tuple of int
        Rows and columns of zero points on each side.
    norm : GroupNorm or None
        Over the channels of each image, its tensors in float32; the result differs from PyTorch's by rounding.
    silu : bool
        Only with a norm.
    held : Held, optional
        What y is the difference to, in codes; written to. One grid for all of `x` then.

    Returns
    -------
    Tensor, dtype uint8
        Codes, shape of `x` plus padding.
    Tensor, shape `x.shape[:-1]`, dtype float32, or None
        Sum of code - zero_point over the channels of each position.

    Raises
    ------
    KernelError
        If grids, the norm or what is held do not fit `x`, or are of another dtype, or an empty image is to be padded.
    """
    assert _native is not None
    _check_grids(x, step, zero_point)
    if norm is not None:
        _check_norm(x, norm)
    x = x if x.dtype in _FLOATS else x.float()
    pitch = _pitch(x)
    if pitch == 0:
        x, pitch = x.contiguous(), x.shape[-1]
    step, runs, channels = step.contiguous(), zero_point.numel(), x.shape[-1]
    codes_shape = list(x.shape)
    if x.dim() == 4:
        batch, height, width = x.shape[:3]
        codes_shape[1:3] = height + 2 * padding[0], width + 2 * padding[1]
    else:
        batch, height, width = 1, math.prod(x.shape[:-1]), 1
    codes = torch.empty(codes_shape, dtype=torch.uint8)
    sums = torch.empty(x.shape[:-1], dtype=torch.float32) if with_sums else None
    if x.numel() == 0:
        if codes.numel():
            raise KernelError(f"image: got shape {tuple(x.shape)}, wanted pixels to put {padding} of padding around")
        return codes, None if sums is None else sums.zero_()
    weight, bias = (None, None) if norm is None else (norm.weight, norm.bias)
    _native.quantize(
        x.data_ptr(), codes.data_ptr(), _address(sums), step.data_ptr(), zero_point.data_ptr(),
        batch, height, width, channels, pitch, *padding, runs, step.numel() // runs, 2**bits - 1,
        x.dtype is torch.bfloat16, norm is not None and silu, 0 if norm is None else norm.groups,
        _address(weight), _address(bias), _threads(x.numel()), *_held(held, x), 0.0 if norm is None else norm.eps,
    )  # fmt: skip
    return codes, sums


def finish(
    product: Tensor,
    outputs: int,
    dtype: torch.dtype,
    *,
    sums: Tensor | None = None,
    scale: Tensor | None = None,
    correction: Tensor | None = None,
    residual: Tensor | None = None,
    geometry: ConvGeometry = POINT,
    padding: tuple[int, int] = (0, 0),
) -> Tensor:
    """Add the digits of a product, subtract scale * (sum of the inputs) * correction, add the residual.

    Parameters
    ----------
    product : Tensor, shape (B, OH, OW, digits * N) or (M, digits * N), dtype float32
        Contiguous; written to.
    outputs : int
        N.
    dtype : torch.dtype
    sums : Tensor, shape (B, H, W) or (M,), dtype float32, or None
        Sums of each position's codes, less zero points; needed for a correction.
    scale : Tensor, shape (R,), dtype float32, or None
        Of each of R equal runs of rows.
    correction : Tensor, shape (N,), dtype float32, or None
    residual : Tensor, M * N elements, floating dtype, or None
    geometry : ConvGeometry, optional
        Of a convolution.
    padding : tuple of int
        Rows and columns on each side of a convolution's images that `sums` leaves out.

    Returns
    -------
    Tensor, shape of `product` but for N, dtype `dtype`
    """
    assert _native is not None
    batch, out_height, out_width = product.shape[:3] if product.dim() == 4 else (1, product.shape[0], 1)
    height, width = (0, 0) if sums is None else sums.shape[1:] if sums.dim() == 3 else (sums.numel(), 1)
    given = dtype if dtype in _FLOATS else torch.float32
    if product.shape[-1] == outputs and given is torch.float32:
        out = product
    else:
        out = torch.empty(*product.shape[:-1], outputs, dtype=given)
    residual = None if residual is None else residual.to(given).contiguous()
    sums = None if sums is None or correction is None else sums.contiguous()
    _native.finish(
        product.data_ptr(), out.data_ptr(), _address(residual), _address(sums), _address(scale), _address(correction),
        batch, out_height, out_width, outputs, product.shape[-1] // max(outputs, 1), height, width,
        1 if scale is None else scale.numel(), *geometry.kernel, *geometry.stride, *geometry.dilation, *padding,
        given is torch.bfloat16, _threads(product.numel()),
    )  # fmt: skip
    return out.to(dtype)


def finish_matrix(
    product: Tensor,
    outputs: int,
    dtype: torch.dtype,
    *,
    scale: Tensor,
    zero_point: Tensor,
    weight_scale: Tensor,
    weight_sums: Tensor,
    bias: Tensor,
    sums: Tensor | None = None,
    correction: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Scale a matrix product of integers, add its digits, correct for zero points, add bias and residual.

    Parameters
    ----------
    product : Tensor, shape (M, digits * N), dtype int32
        Sums of (code - 128) * weight; contiguous.
    outputs : int
        N.
    dtype : torch.dtype
    scale, zero_point : Tensor, shape (R,), dtype float32 and int32
        Of the codes, for each of R equal runs of rows.
    weight_scale, weight_sums : Tensor, shape (digits * N,), dtype float32 and int32
        The weights' scales, and sums of the weights of each output.
    sums : Tensor, shape (M,), dtype float32, or None
        Sums of each row's codes, less zero points; needed for a correction.
    bias : Tensor, shape (N,), dtype float32
    correction : Tensor, shape (N,), dtype float32, or None
    residual : Tensor, M * N elements, floating dtype, or None

    Returns
    -------
    Tensor, shape (M, N), dtype `dtype`
    """
    assert _native is not None
    given = dtype if dtype in _FLOATS else torch.float32
    out = torch.empty(product.shape[0], outputs, dtype=given)
    residual = None if residual is None else residual.to(given).contiguous()
    _native.finish_matrix(
        product.data_ptr(), out.data_ptr(), _address(residual), _address(sums), scale.data_ptr(),
        zero_point.data_ptr(), weight_scale.data_ptr(), weight_sums.data_ptr(), _address(correction), bias.data_ptr(),
        product.shape[0], outputs, product.shape[1] // max(outputs, 1), scale.numel(),
        given is torch.bfloat16, _threads(product.numel()),
    )  # fmt: skip
    return out.to(dtype)


class ProductLevel(IntEnum):
    """What `product` uses; the same integers and float32 operations with either."""

    NONE = 0
    AVX2 = 1
    VNNI = 2


@functools.cache
def product_level() -> ProductLevel:
    """Return what `product` uses here: what the CPU has, and no more than PyTorch was told to (ATEN_CPU_CAPABILITY)."""
    if _native is None:
        return ProductLevel.NONE
    capability = torch.backends.cpu.get_cpu_capability()
    most = ProductLevel.VNNI if capability.startswith("AVX512") else ProductLevel.AVX2
    return min(most if capability != "DEFAULT" else ProductLevel.NONE, ProductLevel(_native.product_level()))


@dataclass(frozen=True, slots=True)
class ProductWeight:
    """An int8 weight as `product` reads it, of N output channels in blocks of LANES.

    Attributes
    ----------
    values : Tensor, shape (blocks, taps, C / QUAD, LANES, QUAD), dtype int8
    scale : Tensor, shape (blocks * LANES,), dtype float32
    sums : Tensor, shape (blocks * LANES,), dtype int32
        Of each output channel's weights.
    zero : Tensor, shape (blocks * LANES,), dtype int32, or None
        What weights are less by: zero points of 8-bit codes, if they have some.
    no_bias : Tensor, shape (blocks * LANES,), dtype float32
        Zeros.
    outputs : int
        N.
    """

    values: Tensor
    scale: Tensor
    sums: Tensor
    zero: Tensor | None
    no_bias: Tensor
    outputs: int


def pack_product(matrix: Tensor, scale: Tensor, zero: Tensor) -> ProductWeight:
    """Lay out int8 weights (N, taps, C), C a multiple of QUAD, their scales (N,) and zero points (N,) for `product`."""
    n, taps, channels = matrix.shape
    blocks = -(-n // LANES)
    padded = matrix.new_zeros(blocks * LANES, taps, channels)
    padded[:n] = matrix
    values = padded.view(blocks, LANES, taps, channels // QUAD, QUAD).permute(0, 2, 3, 1, 4).contiguous()
    more, sums = (0, blocks * LANES - n), padded.sum((1, 2), dtype=torch.int32)
    zeros = F.pad(zero.int(), more) if bool(zero.any()) else None
    return ProductWeight(values, F.pad(scale, more), sums, zeros, torch.zeros(blocks * LANES), n)


def pad_bias(bias: Tensor | None, weight: ProductWeight) -> Tensor:
    """Return a bias (N,) in whole blocks, float32."""
    if bias is None:
        return weight.no_bias
    return F.pad(bias.float(), (0, len(weight.no_bias) - weight.outputs))


def product(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    weight: ProductWeight,
    bias: Tensor,
    out: Tensor,
    geometry: ConvGeometry = POINT,
    residual: Tensor | None = None,
) -> None:
    """Multiply or convolve codes, scale the integers, add bias and residual: `kernels.gemm`'s definition, bit for bit.

    Parameters
    ----------
    codes : Tensor, shape (M, C) or (B, H, W, C), dtype uint8
        Contiguous; images are padded already.
    scale, zero_point : Tensor, shape (R,), dtype float32 and int32
        Of each of R equal runs of rows.
    weight : ProductWeight
    bias : Tensor
        As of `pad_bias`.
    out : Tensor, shape (M, N) or (B, OH, OW, N), dtype float32 or bfloat16
        Contiguous; written to.
    geometry : ConvGeometry, optional
    residual : Tensor, shape and dtype of `out`, optional
        Contiguous.
    """
    assert _native is not None
    if codes.dim() == 4:
        batch, height, width, channels = codes.shape
        out_height, out_width = out.shape[1:3]
    else:
        (width, channels), batch, height = codes.shape, 1, 1
        out_height, out_width = 1, width
    _native.product(
        codes.data_ptr(), weight.values.data_ptr(), out.data_ptr(), _address(residual), scale.data_ptr(),
        zero_point.data_ptr(), weight.scale.data_ptr(), weight.sums.data_ptr(), bias.data_ptr(),
        _address(weight.zero), batch, height, width, channels, out_height, out_width, weight.outputs, scale.numel(),
        *geometry.kernel, *geometry.stride, *geometry.dilation, out.dtype is torch.bfloat16, _threads(out.numel()),
        product_level() is ProductLevel.VNNI,
    )  # fmt: skip


def plan_layer(
    x: Tensor,
    grid: CpuGrid,
    bits: int,
    norm: GroupNorm | None,
    weight: ProductWeight,
    bias: Tensor,
    shape: tuple[int, ...],
    geometry: ConvGeometry,
) -> bytes | None:
    """Prepare `run_layer` for inputs that lie like `x` and outputs of `shape`; None if it can't read such.

    The addresses of `norm`'s tensors, `weight` and `bias` are in it: they must stay.
    """
    assert _native is not None
    pitch = _pitch(x)
    if pitch == 0 or not grid.step.is_contiguous() or (norm is not None and x.dim() != 4):
        return None
    if norm is not None:
        _check_norm(x, norm)
    is_image = x.dim() == 4
    batch, height, width = x.shape[:3] if is_image else (1, math.prod(x.shape[:-1]), 1)
    out_height, out_width = shape[1:3] if is_image else (height, 1)
    norm_weight, norm_bias = (None, None) if norm is None else (norm.weight, norm.bias)
    padding, half = geometry.padding, x.dtype is torch.bfloat16
    return bytes(
        _native.plan_layer(
            0, 0, 0, 0, 0, batch, height, width, x.shape[-1], pitch, *padding, 1, grid.step.numel(), 2**bits - 1, half,
            norm is not None, 0 if norm is None else norm.groups, _address(norm_weight), _address(norm_bias),
            _threads(x.numel()), 0, 0, 0, 0,
            0, weight.values.data_ptr(), 0, 0, 0, 0, weight.scale.data_ptr(), weight.sums.data_ptr(), bias.data_ptr(),
            _address(weight.zero), batch, height + 2 * padding[0], width + 2 * padding[1], x.shape[-1],
            out_height, out_width, weight.outputs, 1, *geometry.kernel, *geometry.stride, *geometry.dilation, half,
            _threads(math.prod(shape)), product_level() is ProductLevel.VNNI, 0.0 if norm is None else norm.eps,
        )
    )  # fmt: skip


def run_layer(plan: bytes, x: Tensor, out: Tensor, residual: Tensor | None, grid: CpuGrid) -> None:
    """Quantize `x`, multiply, scale and add, into `out`; all as `plan_layer` was told, `grid` of one run."""
    assert _native is not None
    _native.run_layer(
        plan, x.data_ptr(), out.data_ptr(), 0 if residual is None else residual.data_ptr(),
        grid.step.data_ptr(), grid.zero_point.data_ptr(), grid.scale.data_ptr(),
    )  # fmt: skip


def _held(held: Held | None, x: Tensor) -> tuple[int, int, int, int]:
    """Return addresses of what is held, its scale and the channels' factors, and whether it has no values yet."""
    if held is None:
        return 0, 0, 0, 0
    held.check(x)
    return held.values.data_ptr(), held.scale.data_ptr(), _address(held.restore), int(held.is_first)


def _check_grids(x: Tensor, step: Tensor, zero_point: Tensor) -> None:
    """Refuse grids that would be read wrongly, or beyond their end."""
    runs, channels, rows = zero_point.numel(), x.shape[-1], math.prod(x.shape[:-1])
    # A run is whole lines of an image, or rows of a matrix.
    lines = x.shape[0] * x.shape[1] if x.dim() == 4 else rows
    if runs == 0 or lines % runs or step.numel() not in (runs, runs * channels):
        raise KernelError(
            f"activation grids: got {runs} zero points and {step.numel()} steps, wanted a number that divides {lines} "
            f"rows, and as many steps or {channels} times as many"
        )
    if (step.dtype, zero_point.dtype) != (torch.float32, torch.int32):
        raise KernelError(f"activation grids: got {step.dtype} and {zero_point.dtype}, wanted float32 and int32")


def _check_norm(x: Tensor, norm: GroupNorm) -> None:
    """Refuse a norm that would be read beyond its end."""
    channels = x.shape[-1]
    for tensor in (norm.weight, norm.bias):
        if tensor is not None and (tensor.shape != (channels,) or tensor.dtype is not torch.float32):
            raise KernelError(f"group norm: got {tensor.dtype} {tuple(tensor.shape)}, wanted float32 ({channels},)")
    if x.dim() != 4 or channels % norm.groups:
        raise KernelError(f"group norm: got {norm.groups} groups for {tuple(x.shape)}, wanted them to divide channels")


def _pitch(x: Tensor) -> int:
    """Return the elements from one position's channels to the next one's, if they lie evenly; else 0."""
    if x.is_contiguous():
        return x.shape[-1]
    even = all(x.stride(i) == x.stride(i + 1) * x.shape[i + 1] for i in range(x.dim() - 2))
    return x.stride(-2) if x.dim() > 1 and x.stride(-1) == 1 and even else 0


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _threads(elements: int) -> int:
    """Return how many threads to use."""
    return max(1, min(torch.get_num_threads(), elements // _THREAD))
