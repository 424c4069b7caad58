"""Integer Linear and Conv2d on the CPU, by PyTorch's oneDNN operators: uint8 codes x int8 weights, summed in int32.

Activations (`kernels.cpu_activation`) are uint8 with one grid, or one for each sample. `kernels.cpu_weight` lays
weights out. A Linear's sums are the reference's integers; a convolution's differ by `CONV_TOLERANCE`.

`torch.compile` traces all of this: oneDNN's operators are registered with PyTorch, and quantization and what follows
the sums are plain tensor operations, which it fuses with what precedes and follows the layer.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import native
from kernels.activations import QuantizedActivation
from kernels.conv import ConvGeometry
from kernels.cpu_activation import CpuActivation, pad_codes, position_sums
from kernels.cpu_weight import ConvLayout, CpuWeight, SmallMatrix
from kernels.epilogue import Epilogue, add_epilogue
from kernels.errors import KernelError
from kernels.gemm import epilogue_rows

# Of a convolution's output, relative to scale * sum code * |w| with codes as they are stored: oneDNN is told of no zero
# points, so the sum of unsigned codes and what zero points add to it are rounded to float32 apart, and then subtracted.
CONV_TOLERANCE = 2.0**-21


def cpu_linear(x: QuantizedActivation, weight: CpuWeight, epilogue: Epilogue) -> Tensor:
    """Multiply uint8 codes (..., K) with a weight.

    Parameters
    ----------
    x : QuantizedActivation
        One grid, or one for each of R equal runs of rows.
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
    rows = x.codes.reshape(math.prod(shape[:-1]), weight.channels)
    if _is_small(weight, len(rows), epilogue):
        return _small_product(rows, x, weight, shape, epilogue)
    assert weight.packed is not None
    assert not isinstance(weight.packed, ConvLayout)
    if isinstance(weight.packed, SmallMatrix):
        return _finish_matrix(_multiply_small(rows, weight.packed), x, weight, epilogue).view(shape)
    direct = _is_direct(weight, epilogue)
    multiply = torch.ops.quantmill.cpu_linear.default if torch.compiler.is_compiling() else _linear_rows
    bias, dtype = _padded_bias(weight, epilogue), epilogue.dtype if direct else torch.float32
    out = multiply(rows, x.scale, x.zero_point, weight.packed, weight.scale, bias, dtype)
    return out.view(shape) if direct else _finish(out, x, weight, epilogue).view(shape)


def cpu_conv2d(x: QuantizedActivation, weight: CpuWeight, epilogue: Epilogue) -> Tensor:
    """Convolve uint8 codes (B, H, W, C) with a weight.

    Parameters
    ----------
    x : QuantizedActivation
        One grid, or one for each sample. As a `CpuActivation` it may be padded already.
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
    geometry, layout = weight.geometry, weight.packed
    if geometry is None or x.codes.dim() != 4:
        raise KernelError(f"cpu conv2d: got codes {tuple(x.codes.shape)}, wanted (B, H, W, C) and a Conv2d's weight")
    _check_codes(x, weight)
    x = pad_codes(x, geometry.padding)
    batch, height, width, channels = x.codes.shape
    shape = (batch, *replace(geometry, padding=(0, 0)).output_size(height, width), weight.outputs)
    epilogue.check(shape)
    if _is_small(weight, batch * shape[1] * shape[2], epilogue):
        return _small_product(x.codes, x, weight, shape, epilogue)
    assert isinstance(layout, ConvLayout)
    packed = layout.for_images((batch, channels, height, width))
    bias, single = _zero_point_bias(x, weight, epilogue), x.scale.numel() == 1
    if single and _is_direct(weight, epilogue):
        return _conv2d_image(x.codes, x.scale, packed, weight, bias[0], epilogue.dtype)
    if single:
        out = _conv2d_image(x.codes, x.scale, packed, weight, bias[0], torch.float32)
    else:
        out = _conv2d_image(x.codes, torch.ones(1), packed, weight, None, torch.float32)
        scale, bias = (t.repeat_interleave(batch // len(t), 0).view(batch, 1, 1, -1) for t in (x.scale, bias))
        out = torch.addcmul(bias, out, scale)
    return _finish(out, x, weight, epilogue).view(shape)


def _is_small(weight: CpuWeight, positions: int, epilogue: Epilogue) -> bool:
    """Whether a product is so small that what surrounds it takes longer, or nothing else multiplies it exactly."""
    if weight.small is None or weight.packed is None:
        return weight.small is not None
    if not native.is_usable() or epilogue.low_rank is not None:
        return False
    small = positions * weight.small.values.numel() <= weight.small_work
    return small and epilogue.dtype in (torch.float32, torch.bfloat16)


def _small_product(
    codes: Tensor, x: QuantizedActivation, weight: CpuWeight, shape: tuple[int, ...], epilogue: Epilogue
) -> Tensor:
    """Multiply, scale and add in one call; exactly the reference's integers, and its float32 operations."""
    small, geometry = weight.small, weight.geometry or native.POINT
    assert small is not None
    if epilogue.low_rank is not None:
        raise KernelError("cpu product: got a low-rank branch, wanted it in the residual")
    dtype = torch.bfloat16 if epilogue.dtype is torch.bfloat16 else torch.float32
    residual = None if epilogue.residual is None else epilogue.residual.to(dtype).contiguous()
    bias = native.pad_bias(epilogue.bias, small)
    multiply = torch.ops.quantmill.cpu_product.default if torch.compiler.is_compiling() else _product
    out = multiply(
        codes.contiguous(), x.scale, x.zero_point, small.values, small.scale, small.sums, small.zero, bias, residual,
        [*geometry.kernel, *geometry.stride, *geometry.dilation], list(shape), dtype,
    )  # fmt: skip
    return out.to(epilogue.dtype)


def _product(
    codes: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    values: Tensor,
    scale: Tensor,
    sums: Tensor,
    zero: Tensor | None,
    bias: Tensor,
    residual: Tensor | None,
    sizes: list[int],
    shape: list[int],
    dtype: torch.dtype,
) -> Tensor:
    """Multiply codes, padded already, by `native.product`; `sizes` are a kernel's, its stride's and its dilation's."""
    out = torch.empty(shape, dtype=dtype)
    weight = native.ProductWeight(values, scale, sums, zero, bias, shape[-1])
    kh, kw, sh, sw, dh, dw = sizes
    native.product(
        codes, x_scale, x_zero, weight, bias, out, ConvGeometry((kh, kw), (sh, sw), (0, 0), (dh, dw)), residual
    )
    return out


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
    """Whether what oneDNN gives is the layer's output; not every CPU of it writes float16."""
    plain = weight.digits == 1 and weight.correction is None and epilogue.dtype is not torch.float16
    return plain and epilogue.residual is None and epilogue.low_rank is None


def _padded_bias(weight: CpuWeight, epilogue: Epilogue) -> Tensor | None:
    """Return the bias for oneDNN's output channels: the first digit's take it."""
    if epilogue.bias is None:
        return None
    bias = epilogue.bias.float()
    return bias if weight.digits == 1 else F.pad(bias, (0, (weight.digits - 1) * weight.outputs))


def _zero_point_bias(x: QuantizedActivation, weight: CpuWeight, epilogue: Epilogue) -> Tensor:
    """Return the bias less what zero points add to the sums of unsigned codes, (R, digits * N)."""
    grid = x.grid if isinstance(x, CpuActivation) else None
    bias, shift = _padded_bias(weight, epilogue), (x.scale * x.zero_point)[:, None] if grid is None else grid.shift
    return shift * -weight.zero_term if bias is None else torch.addcmul(bias, shift, weight.zero_term, value=-1)


def _finish(out: Tensor, x: QuantizedActivation, weight: CpuWeight, epilogue: Epilogue) -> Tensor:
    """Add up the digits of float32 `out`, (..., digits * N), written to; correct for zero points, add the rest.

    Codes less their zero points are whole numbers, their sums below 2**24 (65793 inputs or fewer): exact in float32.
    """
    n, sums, left_out = weight.outputs, None, (0, 0)
    if weight.correction is not None:
        sums, left_out = position_sums(x)
        sums = sums.reshape(-1) if weight.geometry is None else sums
    if native.is_usable() and epilogue.low_rank is None:
        return native.finish(
            out,
            n,
            epilogue.dtype,
            sums=sums,
            scale=x.scale,
            correction=weight.correction,
            residual=epilogue.residual,
            geometry=weight.geometry or native.POINT,
            padding=left_out,
        )
    out = out.view(-1, out.shape[-1])
    value = out[:, :n]
    for digit in range(1, weight.digits):
        value = value + out[:, digit * n : (digit + 1) * n]
    if weight.correction is not None and sums is not None:
        seen = sums if weight.geometry is None else _window_sums(sums.unsqueeze(1), left_out, weight.geometry)
        value = value - (seen.reshape(x.scale.numel(), -1) * x.scale[:, None]).view(-1, 1) * weight.correction
    return add_epilogue(value, epilogue_rows(replace(epilogue, bias=None)), epilogue.dtype)


def _multiply_small(rows: Tensor, matrix: SmallMatrix) -> Tensor:
    """Return the sums (M, digits * N), int32, of code - 128."""
    signed = rows.bitwise_xor(0x80).view(torch.int8)
    if signed.shape[1] == 1:  # PyTorch 2.13 reads the rows of a matrix of one column wrongly
        return signed.int() * matrix.values.int()
    return torch._int_mm(signed, matrix.values)


def _finish_matrix(product: Tensor, x: QuantizedActivation, weight: CpuWeight, epilogue: Epilogue) -> Tensor:
    """Scale the sums (M, digits * N), int32, of code - 128; correct them for zero points, add the rest."""
    sums = None if weight.correction is None else position_sums(x)[0].reshape(-1)
    if native.is_usable() and epilogue.low_rank is None:
        return native.finish_matrix(
            product,
            weight.outputs,
            epilogue.dtype,
            scale=x.scale,
            zero_point=x.zero_point,
            weight_scale=weight.scale,
            weight_sums=weight.sums,
            sums=sums,
            correction=weight.correction,
            bias=torch.zeros(weight.outputs) if epilogue.bias is None else epilogue.bias.float(),
            residual=epilogue.residual,
        )
    runs = product.view(x.scale.numel(), -1, weight.digits, weight.outputs)
    zero = (x.zero_point - 128).view(-1, 1, 1, 1)
    sizes = (weight.digits, weight.outputs)
    value = ((runs - zero * weight.sums.view(sizes)) * weight.scale.view(sizes)).sum(2)
    if weight.correction is not None and sums is not None:
        value = value - sums.view(x.scale.numel(), -1, 1) * weight.correction
    value = (value * x.scale.view(-1, 1, 1)).view(-1, weight.outputs)
    return add_epilogue(value, epilogue_rows(epilogue), epilogue.dtype)


def _window_sums(sums: Tensor, padding: tuple[int, int], geometry: ConvGeometry) -> Tensor:
    """Return the sum of the inputs that each output position sees, in channels and taps, (B, 1, OH, OW)."""
    if geometry.dilation == (1, 1) and all(2 * p <= k for p, k in zip(padding, geometry.kernel, strict=True)):
        return F.avg_pool2d(sums, geometry.kernel, geometry.stride, padding, divisor_override=1)
    return F.conv2d(sums, torch.ones(1, 1, *geometry.kernel), None, geometry.stride, padding, geometry.dilation)


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


# Inductor takes oneDNN's own operator for weights that it knows to be constant only.
_LIBRARY = torch.library.Library("quantmill", "FRAGMENT")
_LIBRARY.define(
    "cpu_linear(Tensor codes, Tensor x_scale, Tensor x_zero, Tensor packed, Tensor scale, Tensor? bias, "
    "ScalarType dtype) -> Tensor"
)
_LIBRARY.impl("cpu_linear", _linear_rows, "CompositeExplicitAutograd")


_LIBRARY.define(
    "cpu_product(Tensor codes, Tensor x_scale, Tensor x_zero, Tensor values, Tensor scale, Tensor sums, Tensor? zero, "
    "Tensor bias, Tensor? residual, int[] sizes, SymInt[] shape, ScalarType dtype) -> Tensor"
)
_LIBRARY.impl("cpu_product", _product, "CompositeExplicitAutograd")


@torch.library.register_fake("quantmill::cpu_product")
def _(
    codes: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    values: Tensor,
    scale: Tensor,
    sums: Tensor,
    zero: Tensor | None,
    bias: Tensor,
    residual: Tensor | None,
    sizes: list[int],
    shape: list[int],
    dtype: torch.dtype,
) -> Tensor:
    return codes.new_empty(shape, dtype=dtype)


@torch.library.register_fake("quantmill::cpu_linear")
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
    codes: Tensor, x_scale: Tensor, packed: Tensor, weight: CpuWeight, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Convolve padded codes (B, H, W, C) as they are, without zero points."""
    assert isinstance(weight.packed, ConvLayout)
    geometry, zeros = weight.packed.unpadded, weight.packed.zeros
    sizes = (geometry.stride, geometry.padding, geometry.dilation, 1)
    image = codes.contiguous().permute(0, 3, 1, 2)
    out = torch.ops.onednn.qconv_pointwise.tensor(
        image, x_scale, zeros[:1], packed, weight.scale, zeros, bias, *sizes, 1.0, 0, dtype, "none", [], ""
    )
    return out.permute(0, 2, 3, 1).contiguous()
