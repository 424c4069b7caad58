"""Integer Linear and Conv2d on the CPU, by PyTorch's oneDNN operators: uint8 codes x int8 weights, summed in int32.

Activations are uint8 with one grid, or one for each sample. `kernels.cpu_weight` lays weights out.

Outside of compilation the operators' bodies are called directly: PyTorch's dispatch of an operator that is registered
in Python takes some 20 us, which is the time of a small layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.activations import ActivationTable, QuantizedActivation, gather_steps, minmax_grid
from kernels.conv import ConvGeometry
from kernels.cpu_weight import CpuWeight
from kernels.epilogue import Epilogue, add_epilogue
from kernels.errors import KernelError
from kernels.gemm import epilogue_rows


def quantize_cpu_by_table(x: Tensor, table: ActivationTable, index: Tensor | None = None) -> QuantizedActivation:
    """Quantize to uint8 codes by a table; else as `kernels.activations.quantize_by_table`.

    Parameters
    ----------
    x : Tensor, shape (..., C), floating dtype
    table : ActivationTable
    index : Tensor, shape () or (B,), dtype int64, optional

    Returns
    -------
    QuantizedActivation
        uint8 codes, unsigned zero points, R is 1 or B.
    """
    scale, zero = gather_steps(table.scale, index), gather_steps(table.zero_point, index)
    step = scale.view(-1, 1, 1)
    if table.shift is not None:
        step = step * torch.exp2(table.shift.float())
    runs = x.reshape(len(scale), -1, x.shape[-1])
    codes = _unsigned_codes(runs, step, zero.view(-1, 1, 1), table.bits).view(x.shape)
    return QuantizedActivation(codes, scale, zero.to(torch.int32), symmetric=False)


def quantize_cpu_dynamic(x: Tensor, bits: int, *, symmetric: bool) -> QuantizedActivation:
    """Quantize to uint8 codes with the range of each sample (first dimension)."""
    runs = x.reshape(x.shape[0], -1)
    scale, zero = minmax_grid(runs.amin(1).float(), runs.amax(1).float(), bits, symmetric)
    codes = _unsigned_codes(runs, scale[:, None], zero[:, None], bits).view(x.shape)
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
    plain = epilogue.residual is None and epilogue.low_rank is None and weight.is_plain
    linear = _cpu_linear if torch.compiler.is_compiling() else _linear_rows
    out = linear(
        rows,
        x.scale,
        x.zero_point,
        weight.packed,
        weight.scale,
        epilogue.bias.float() if plain and epilogue.bias is not None else None,
        epilogue.dtype if plain else torch.float32,
    )
    return out.view(shape) if plain else _finish(out, weight, epilogue).view(shape)


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
    plain = epilogue.residual is None and epilogue.low_rank is None and weight.is_plain
    conv2d = _cpu_conv2d if torch.compiler.is_compiling() else _conv2d_image
    out = conv2d(
        x.codes,
        x.scale,
        x.zero_point,
        weight.packed,
        weight.scale,
        epilogue.bias.float() if plain and epilogue.bias is not None else None,
        weight.geometry.to_ints(),
        epilogue.dtype if plain else torch.float32,
    )
    return out if plain else _finish(out.view(-1, out.shape[-1]), weight, epilogue).view(shape)


def _unsigned_codes(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Codes of `kernels.affine`, uint8. By way of int8: PyTorch converts floats to it with vector instructions, to
    uint8 one by one, which takes longer than all the rest.
    """
    signed = (x.float() / scale).round_().add_(zero_point - 128).clamp_(-128, 2**bits - 129).to(torch.int8)
    return signed.view(torch.uint8).bitwise_xor_(0x80)


def _check_codes(x: QuantizedActivation, weight: CpuWeight) -> None:
    """Refuse what oneDNN would misread."""
    if x.codes.dtype != torch.uint8 or x.codes.shape[-1] != weight.channels:
        raise KernelError(
            f"cpu codes: got {x.codes.dtype} of {x.codes.shape[-1]} channels, wanted torch.uint8 of {weight.channels}"
        )
    if not len(x.scale) or x.codes.shape[0] % len(x.scale):
        raise KernelError(
            f"cpu codes: got {len(x.scale)} grids for {x.codes.shape[0]} samples, wanted 1 or one for each"
        )


def _finish(out: Tensor, weight: CpuWeight, epilogue: Epilogue) -> Tensor:
    """Add up the digits of oneDNN's output, float32 (M, its channels); take the ones' channel off; add the epilogue."""
    n = weight.outputs
    value = out[:, :n]
    for digit in range(1, weight.digits):
        value = value + out[:, digit * n : (digit + 1) * n]
    if weight.correction is not None:
        value = torch.addcmul(value, out[:, -1:], weight.correction, value=-1)
    return add_epilogue(value, epilogue_rows(epilogue), epilogue.dtype)


def _qlinear(
    codes: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    zero = torch.zeros(len(scale), dtype=torch.int32)
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
    if len(x_scale) == 1:
        return _qlinear(codes, x_scale, x_zero, packed, scale, bias, dtype)
    runs = zip(codes.chunk(len(x_scale)), x_scale.split(1), x_zero.split(1), strict=True)
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
    zero = torch.zeros(len(scale), dtype=torch.int32)
    image = codes.contiguous().permute(0, 3, 1, 2)
    sizes = [list(shape.stride), list(shape.padding), list(shape.dilation), 1]

    def convolve(part: Tensor, x_scale: Tensor, x_zero: Tensor) -> Tensor:
        out = torch.ops.onednn.qconv_pointwise.tensor(
            part, x_scale, x_zero, packed, scale, zero, bias, *sizes, 1.0, 0, dtype, "none", [], ""
        )
        return out.permute(0, 2, 3, 1)

    if len(x_scale) == 1:
        return convolve(image, x_scale, x_zero).contiguous()
    parts = zip(image.chunk(len(x_scale)), x_scale.split(1), x_zero.split(1), strict=True)
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
