"""Integer Linear and Conv2d on the CPU, by PyTorch's oneDNN operators: uint8 codes x int8 weights, summed in int32.

Activations are uint8 with one grid, or one for each sample. `kernels.cpu_weight` lays weights out.

Outside of compilation the operators' bodies are called directly: PyTorch's dispatch of an operator that is registered
in Python takes some 20 us, which is the time of a small layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.activations import ActivationTable, QuantizedActivation, dynamic_grid, gather_steps
from kernels.conv import ConvGeometry
from kernels.cpu_weight import CpuWeight
from kernels.epilogue import Epilogue, add_epilogue
from kernels.errors import KernelError
from kernels.gemm import epilogue_rows

# Elements that are quantized at a time: 256 KiB of float32, so that all passes but the first read from the cache.
_BLOCK = 1 << 16


@dataclass(frozen=True, slots=True)
class CpuGrid:
    """The grid of each of R equal runs of rows, ready to quantize with.

    Attributes
    ----------
    scale : Tensor, shape (R,), dtype float32
    zero_point : Tensor, shape (R,), dtype int32
    step : Tensor, shape (R, 1, 1) or (R, 1, C), dtype float32
        What a channel is divided by.
    offset : Tensor, shape (R, 1, 1), dtype float32
        zero_point - 128.
    """

    scale: Tensor
    zero_point: Tensor
    step: Tensor
    offset: Tensor


def cpu_grid(table: ActivationTable, index: Tensor | None = None) -> CpuGrid:
    """Look up the grids of steps `index`, shape () or (B,), dtype int64; None if the table has one entry."""
    scale, zero = gather_steps(table.scale, index), gather_steps(table.zero_point, index)
    step = gather_steps(table.scale if table.divisor is None else table.divisor, index)
    return CpuGrid(scale, zero.to(torch.int32), step.view(len(scale), 1, -1), (zero - 128).view(-1, 1, 1))


@dataclass(frozen=True, slots=True)
class CpuActivation(QuantizedActivation):
    """As its base, with what asymmetric 8-bit weights need.

    Attributes
    ----------
    sums : Tensor, shape (rows,), dtype float32, or None
        Sum of code - 128 over the channels of each row; None: to be found where it is needed.
    """

    sums: Tensor | None = None


def quantize_cpu(x: Tensor, grid: CpuGrid, bits: int, *, with_sums: bool = False) -> CpuActivation:
    """Quantize to uint8 codes of `bits` bits.

    Parameters
    ----------
    x : Tensor, shape (..., C), floating dtype
    grid : CpuGrid
    bits : int
    with_sums : bool
        Sum the codes of each row, as `CpuWeight.correction` needs it, while they are in the cache.

    Returns
    -------
    CpuActivation
        uint8 codes, unsigned zero points, R is 1 or B.
    """
    in_blocks = grid.scale.numel() == 1 and not torch.compiler.is_compiling()
    if in_blocks:
        codes, sums = _codes_in_blocks(x.contiguous(), grid, bits, with_sums)
    else:
        runs = x.reshape(grid.scale.numel(), -1, x.shape[-1])
        codes, sums = _unsigned_codes(runs, grid.step, grid.offset, bits).view(x.shape), None
    return CpuActivation(codes, grid.scale, grid.zero_point, False, sums)


def quantize_cpu_by_table(x: Tensor, table: ActivationTable, index: Tensor | None = None) -> QuantizedActivation:
    """Quantize to uint8 codes by a table; else as `kernels.activations.quantize_by_table`."""
    return quantize_cpu(x, cpu_grid(table, index), table.bits)


def quantize_cpu_dynamic(
    x: Tensor, bits: int, *, symmetric: bool, channel_scale: Tensor | None = None
) -> QuantizedActivation:
    """Quantize to uint8 codes with the range of each sample (first dimension); else as `quantize_dynamic`."""
    runs = x.reshape(x.shape[0], -1, x.shape[-1]).float()
    scale, zero, divisor = dynamic_grid(runs, bits, symmetric, channel_scale)
    codes = _unsigned_codes(runs, divisor, zero.view(-1, 1, 1) - 128, bits).view(x.shape)
    return QuantizedActivation(codes, scale, zero.to(torch.int32), symmetric=False)


def cpu_linear(x: QuantizedActivation, weight: CpuWeight, epilogue: Epilogue) -> Tensor:
    """Multiply uint8 codes (..., K) with a weight.

    Parameters
    ----------
    x : QuantizedActivation
        One grid, or one for each of R equal runs of rows (a call of oneDNN for each).
    weight : CpuWeight
    epilogue : Epilogue

    Returns
    -------
    Tensor, shape (..., N), dtype `epilogue.dtype`

    Raises
    ------
    KernelError
        If shapes disagree, or codes are not uint8.
    """
    shape = (*x.codes.shape[:-1], weight.outputs)
    _check_codes(x, weight)
    if weight.geometry is not None:
        raise KernelError("cpu linear: got the weight of a Conv2d, wanted a Linear's")
    epilogue.check(shape)
    rows = x.codes.reshape(math.prod(x.codes.shape[:-1]), weight.channels)
    multiply = _cpu_linear if torch.compiler.is_compiling() else _linear_rows
    direct = _is_direct(weight, epilogue)
    out = multiply(
        rows,
        x.scale,
        x.zero_point,
        weight.packed,
        weight.scale,
        _padded_bias(weight, epilogue),
        epilogue.dtype if direct else torch.float32,
    )
    return out.view(shape) if direct else _finish(out, x, weight, epilogue).view(shape)


def cpu_conv2d(x: QuantizedActivation, weight: CpuWeight, epilogue: Epilogue) -> Tensor:
    """Convolve uint8 codes (B, H, W, C) with a weight.

    Parameters
    ----------
    x : QuantizedActivation
        One grid, or one for each sample (a call of oneDNN for each).
    weight : CpuWeight
    epilogue : Epilogue

    Returns
    -------
    Tensor, shape (B, OH, OW, N), dtype `epilogue.dtype`
        Contiguous.

    Raises
    ------
    KernelError
        If shapes disagree, or codes are not uint8.
    """
    if weight.geometry is None or x.codes.dim() != 4:
        raise KernelError(f"cpu conv2d: got codes {tuple(x.codes.shape)}, wanted (B, H, W, C) and a Conv2d's weight")
    _check_codes(x, weight)
    batch, height, width, _ = x.codes.shape
    shape = (batch, *weight.geometry.output_size(height, width), weight.outputs)
    epilogue.check(shape)
    convolve = _cpu_conv2d if torch.compiler.is_compiling() else _conv2d_image
    direct = _is_direct(weight, epilogue)
    out = convolve(
        x.codes,
        x.scale,
        x.zero_point,
        weight.packed,
        weight.scale,
        _padded_bias(weight, epilogue),
        weight.geometry.to_ints(),
        epilogue.dtype if direct else torch.float32,
    )
    return out if direct else _finish(out.view(-1, out.shape[-1]), x, weight, epilogue).view(shape)


def _unsigned_codes(x: Tensor, step: Tensor, offset: Tensor, bits: int) -> Tensor:
    """Codes of `kernels.affine`, uint8, for a zero point less 128.

    By way of int8: PyTorch converts floats to it with vector instructions, to uint8 one by one, which takes longer than
    all the rest.
    """
    signed = (x.float() / step).round_().add_(offset).clamp_(-128, 2**bits - 129).to(torch.int8)
    return signed.view(torch.uint8).bitwise_xor_(0x80)


def _codes_in_blocks(x: Tensor, grid: CpuGrid, bits: int, with_sums: bool) -> tuple[Tensor, Tensor | None]:
    """Return `_unsigned_codes` of contiguous `x` and the sums of rows, with one grid for all of it."""
    channels, top = x.shape[-1], 2**bits - 129
    rows, count = max(1, _BLOCK // channels), x.numel() // channels
    if count <= rows:
        values = torch.div(x, grid.step.view(-1)).round_().add_(grid.offset.view(1)).clamp_(-128, top)
        codes = values.to(torch.int8).view(torch.uint8).bitwise_xor_(0x80)
        return codes, values.sum(-1).view(-1) if with_sums else None
    step, offset = grid.step.view(-1), grid.offset.view(1)
    signed = torch.empty(x.shape, dtype=torch.int8)
    sums = torch.empty(count) if with_sums else None
    block = torch.empty(rows, channels)
    sources, targets = x.view(-1, channels).split(rows), signed.view(-1, channels).split(rows)
    for i, (source, target) in enumerate(zip(sources, targets, strict=True)):
        size = source.shape[0]
        values = torch.div(source, step, out=block[:size])
        target.copy_(values.round_().add_(offset).clamp_(-128, top))
        if sums is not None:
            torch.sum(values, 1, out=sums[i * rows : i * rows + size])
    return signed.view(torch.uint8).bitwise_xor_(0x80), sums


def _check_codes(x: QuantizedActivation, weight: CpuWeight) -> None:
    """Refuse what oneDNN would misread."""
    if x.codes.dtype != torch.uint8 or x.codes.shape[-1] != weight.channels:
        raise KernelError(
            f"cpu codes: got {x.codes.dtype} of {x.codes.shape[-1]} channels, wanted torch.uint8 of {weight.channels}"
        )
    if not x.scale.numel() or x.codes.shape[0] % x.scale.numel():
        raise KernelError(
            f"cpu codes: got {x.scale.numel()} grids for {x.codes.shape[0]} samples, wanted 1 or one for each"
        )


def _is_direct(weight: CpuWeight, epilogue: Epilogue) -> bool:
    """Whether what oneDNN gives is the layer's output."""
    plain = weight.digits == 1 and weight.correction is None
    return plain and epilogue.residual is None and epilogue.low_rank is None


def _padded_bias(weight: CpuWeight, epilogue: Epilogue) -> Tensor | None:
    """Return the bias for oneDNN's output channels: the first digit's take it."""
    if epilogue.bias is None:
        return None
    bias = epilogue.bias.float()
    return bias if weight.digits == 1 else F.pad(bias, (0, (weight.digits - 1) * weight.outputs))


def _finish(out: Tensor, x: QuantizedActivation, weight: CpuWeight, epilogue: Epilogue) -> Tensor:
    """Add up the digits of oneDNN's output, float32 (M, digits * N), correct for zero points, add the epilogue."""
    n = weight.outputs
    value = out[:, :n]
    for digit in range(1, weight.digits):
        value = value + out[:, digit * n : (digit + 1) * n]
    if weight.correction is not None:
        value = value.addcmul_(_input_sums(x, weight), weight.correction, value=-1)
    if epilogue.residual is None and epilogue.low_rank is None:
        return value.to(epilogue.dtype)
    return add_epilogue(value, epilogue_rows(replace(epilogue, bias=None)), epilogue.dtype)


def _input_sums(x: QuantizedActivation, weight: CpuWeight) -> Tensor:
    """Return the sum of the inputs that each output position sees, (M, 1): of (code - zero) over channels and taps.

    Whole numbers below 2**24 (65793 inputs or fewer), so float32 sums are exact.
    """
    known = x.sums if isinstance(x, CpuActivation) else None
    if known is None:
        known = x.codes.bitwise_xor(0x80).view(torch.int8).sum(-1, dtype=torch.float32)
    sums = torch.sub(known.view(x.scale.numel(), -1), x.zero_point[:, None] - 128, alpha=weight.channels)
    geometry = weight.geometry
    if geometry is not None and (geometry.taps > 1 or geometry.stride != (1, 1) or geometry.padding != (0, 0)):
        batch, height, width, _ = x.codes.shape
        window = torch.ones(1, 1, *geometry.kernel)
        image = sums.view(batch, 1, height, width)
        sums = F.conv2d(image, window, None, geometry.stride, geometry.padding, geometry.dilation)
    return (sums.view(x.scale.numel(), -1) * x.scale[:, None]).view(-1, 1)


def _qlinear(
    codes: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    zero = torch.zeros(scale.numel(), dtype=torch.int32)
    return torch.ops.onednn.qlinear_pointwise.tensor(
        codes, x_scale, x_zero, packed, scale, zero, bias, 1.0, 0, dtype, "none", [], "none"
    )


def _linear_rows(
    codes: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    codes = codes.contiguous()
    if x_scale.numel() == 1:
        return _qlinear(codes, x_scale, x_zero, packed, scale, bias, dtype)
    runs = zip(codes.chunk(x_scale.numel()), x_scale.split(1), x_zero.split(1), strict=True)
    return torch.cat([_qlinear(part, s, z, packed, scale, bias, dtype) for part, s, z in runs])


_cpu_linear = torch.library.custom_op("quantmill::cpu_linear", _linear_rows, mutates_args=())


@_cpu_linear.register_fake
def _(
    codes: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return codes.new_empty(codes.shape[0], scale.shape[0], dtype=dtype)


def _conv2d_image(
    codes: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    geometry: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    shape = ConvGeometry.from_ints(geometry)
    zero = torch.zeros(scale.numel(), dtype=torch.int32)
    image = codes.contiguous().permute(0, 3, 1, 2)
    sizes = [list(shape.stride), list(shape.padding), list(shape.dilation), 1]

    def convolve(part: Tensor, x_scale: Tensor, x_zero: Tensor) -> Tensor:
        out = torch.ops.onednn.qconv_pointwise.tensor(
            part, x_scale, x_zero, packed, scale, zero, bias, *sizes, 1.0, 0, dtype, "none", [], ""
        )
        return out.permute(0, 2, 3, 1)

    if x_scale.numel() == 1:
        return convolve(image, x_scale, x_zero).contiguous()
    parts = zip(image.chunk(x_scale.numel()), x_scale.split(1), x_zero.split(1), strict=True)
    return torch.cat([convolve(*part) for part in parts])


_cpu_conv2d = torch.library.custom_op("quantmill::cpu_conv2d", _conv2d_image, mutates_args=())


@_cpu_conv2d.register_fake
def _(
    codes: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    geometry: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    batch, height, width, _ = codes.shape
    size = ConvGeometry.from_ints(geometry).output_size(height, width)
    return codes.new_empty(batch, *size, scale.shape[0], dtype=dtype)
