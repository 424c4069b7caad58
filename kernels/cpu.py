"""Integer Linear and Conv2d on the CPU, by PyTorch's oneDNN operators: uint8 codes x int8 weights, summed in int32.

    exact       The int8 weight is code - zero point, so up to 7 bits always fit and 8 bits where the zero point is 128.
                Asymmetric 8-bit weights are stored as code - 128, and one more output channel, of ones, sums the input:
                    sum (x - x_zero) (w - zero) = sum (x - x_zero) (w - 128) - (zero - 128) * sum (x - x_zero).
    regridded   Weights with scales per group have no exact int8 form: they are rounded to an int8 grid per output
                channel, at most scale / 2 away. `CpuWeight.exact` says which it is.
    saturation  Without VNNI or AMX, oneDNN adds pairs of products in int16 (vpmaddubsw), which saturates above 32767:
                exact only if 2 * 255 * max|w| fits. `pack_cpu_weight` measures this machine and refuses the rest.

Activations are uint8 with one grid, or one for each sample. Weights are unpacked once, a byte a weight.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.activations import ActivationTable, QuantizedActivation, gather_steps, minmax_grid
from kernels.backend import BackendUnavailableError
from kernels.conv import ConvGeometry
from kernels.epilogue import Epilogue, add_epilogue
from kernels.errors import KernelError
from kernels.gemm import check_weights, epilogue_rows
from kernels.weights import PackedWeight, weight_integers, weight_values

# The largest |w| with which a pair of products can't saturate int16.
PAIR_LIMIT = (2**15 - 1) // (2 * 255)


@dataclass(frozen=True, slots=True)
class CpuWeight:
    """A layer's weight as oneDNN lays it out.

    Attributes
    ----------
    packed : Tensor
        Opaque, int8; N output channels, or N + 1 with the one of ones.
    scale : Tensor, shape (N,) or (N + 1,), dtype float32
    correction : Tensor, shape (N,), dtype float32, or None
        scale * (zero_point - 128), for asymmetric 8-bit weights.
    channels : int
        Input channels.
    geometry : ConvGeometry or None
        None for a Linear.
    exact : bool
        Whether the integers are the artifact's, not regridded ones.
    """

    packed: Tensor
    scale: Tensor
    correction: Tensor | None
    channels: int
    geometry: ConvGeometry | None
    exact: bool


def pack_cpu_weight(
    weights: Sequence[PackedWeight], geometry: ConvGeometry | None = None, input_shape: Sequence[int] | None = None
) -> CpuWeight:
    """Unpack a layer's weight to int8 and have oneDNN lay it out.

    Parameters
    ----------
    weights : sequence of PackedWeight
        One that holds all output channels, or several that divide them; on the CPU.
    geometry : ConvGeometry, optional
        Of a Conv2d; without it, the layer is a Linear.
    input_shape : sequence of int, optional
        (rows, channels), or (B, C, H, W): the shape that oneDNN chooses its layout for. Others work as well, perhaps
        slower.

    Raises
    ------
    BackendUnavailableError
        If this machine's int8 products saturate and the weight is large enough for that, or PyTorch has no oneDNN.
    KernelError
        If the parts do not fit together.
    """
    channels, taps = weights[0].layout.channels, 1 if geometry is None else geometry.taps
    n = check_weights(weights, taps=taps, channels=channels)
    exact = all(weight.layout.groups == 1 for weight in weights)
    integers = torch.empty(n, taps, channels, dtype=torch.int32)
    scale = torch.empty(n, dtype=torch.float32)
    zero = torch.zeros(n, dtype=torch.float32)
    for weight in weights:
        rows = slice(None) if weight.channel is None else weight.channel.long()
        integers[rows], scale[rows], zero[rows] = _int8_rows(weight)
    if not torch.backends.mkldnn.is_available():
        raise BackendUnavailableError("backend: got 'cpu', but this PyTorch has no oneDNN; wanted reference")
    largest = int(integers.abs().max()) if integers.numel() else 0
    if largest > PAIR_LIMIT and not sums_pairs_exactly():
        raise BackendUnavailableError(
            f"backend: got 'cpu' for weights up to {largest} on a CPU without VNNI or AMX, whose int8 products "
            f"saturate; wanted weights up to {PAIR_LIMIT}, or reference"
        )
    correction = None
    if bool(zero.any()):
        integers = torch.cat([integers, torch.ones(1, taps, channels, dtype=torch.int32)])
        correction, scale = scale * zero, torch.cat([scale, torch.ones(1)])
    matrix = integers.to(torch.int8)
    if geometry is None:
        shape = None if input_shape is None else list(input_shape)
        packed = torch.ops.onednn.qlinear_prepack(matrix[:, 0], shape)
    else:
        packed = _prepack_conv(matrix, geometry, scale, input_shape)
    return CpuWeight(packed, scale, correction, channels, geometry, exact)


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
    shape = (*x.codes.shape[:-1], _outputs(weight))
    _check_codes(x, weight)
    if weight.geometry is not None:
        raise KernelError("cpu linear: got the weight of a Conv2d, wanted a Linear's")
    epilogue.check(shape)
    rows = x.codes.reshape(math.prod(x.codes.shape[:-1]), weight.channels)
    plain = epilogue.residual is None and epilogue.low_rank is None and weight.correction is None
    out = _cpu_linear(
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
    shape = (batch, *weight.geometry.output_size(height, width), _outputs(weight))
    epilogue.check(shape)
    plain = epilogue.residual is None and epilogue.low_rank is None and weight.correction is None
    out = _cpu_conv2d(
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


@functools.cache
def sums_pairs_exactly() -> bool:
    """Whether this machine's int8 products are summed without saturation. Measured: oneDNN may be told to use less."""
    codes = torch.full((2, 64), 255, dtype=torch.uint8)
    weight = torch.full((16, 64), 127, dtype=torch.int8)
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    got = _qlinear(codes, torch.ones(1), torch.zeros(1, dtype=torch.int32), packed, torch.ones(16), None, torch.float32)
    return bool((got == 255 * 127 * 64).all())


def _int8_rows(weight: PackedWeight) -> tuple[Tensor, Tensor, Tensor]:
    """Integers (rows, taps, C) that fit int8, their scale (rows,), and the zero point that is still in them (rows,)."""
    if weight.layout.groups > 1:
        values = weight_values(weight)
        scale = (values.abs().amax((1, 2)) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        return (values / scale[:, None, None]).round_().to(torch.int32), scale, torch.zeros(weight.rows)
    integers = weight_integers(weight)
    zero = torch.zeros(weight.rows, dtype=torch.int32)
    if integers.numel() and (int(integers.min()) < -128 or int(integers.max()) > 127):
        zero = weight.zero_point[:, 0].int()
        integers = integers + zero[:, None, None]
    return integers, weight.scale[:, 0].float(), zero.float()


def _prepack_conv(matrix: Tensor, geometry: ConvGeometry, scale: Tensor, input_shape: Sequence[int] | None) -> Tensor:
    """Lay out int8 (N, taps, C) for a convolution."""
    image = matrix.view(len(matrix), *geometry.kernel, matrix.shape[-1]).permute(0, 3, 1, 2).contiguous()
    shape = None if input_shape is None else list(input_shape)
    return torch.ops.onednn.qconv_prepack(
        image, scale, 1.0, 0, list(geometry.stride), list(geometry.padding), list(geometry.dilation), 1, shape
    )


def _unsigned_codes(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Codes of `kernels.affine`, uint8. By way of int8: PyTorch converts floats to it with vector instructions, to
    uint8 one by one, which takes longer than all the rest.
    """
    signed = (x.float() / scale).round_().add_(zero_point - 128).clamp_(-128, 2**bits - 129).to(torch.int8)
    return signed.view(torch.uint8).bitwise_xor_(0x80)


def _outputs(weight: CpuWeight) -> int:
    """Output channels of the layer."""
    return len(weight.scale) - (weight.correction is not None)


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
    """Take the ones' channel off float32 (M, N or N + 1), and add the epilogue."""
    if weight.correction is not None:
        out = torch.addcmul(out[:, :-1], out[:, -1:], weight.correction, value=-1)
    return add_epilogue(out, epilogue_rows(epilogue), epilogue.dtype)


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


@torch.library.custom_op("quantmill::cpu_linear", mutates_args=())
def _cpu_linear(
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


@torch.library.custom_op("quantmill::cpu_conv2d", mutates_args=())
def _cpu_conv2d(
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
