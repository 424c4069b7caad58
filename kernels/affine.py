"""Affine quantization in plain torch. This is the definition: every other backend, simulated or integer, equals it.

    code  = clamp(round(x / scale) + zero_point, quant_min, quant_max)
    x_hat = (code - zero_point) * scale

computed in float32, with a true division (x * (1 / scale) rounds differently) and rounding half to even, as
`torch.round` does: 0.5 -> 0, 1.5 -> 2, 2.5 -> 2. `zero_point` holds whole numbers, so the sums are exact. Whatever
x is, x_hat of a code equal to its zero point is +0.0. Infinities saturate; NaN has no code.

`scale` and `zero_point` have any shape that broadcasts to x's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.errors import KernelError


def quantize_affine(x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """Quantize to integer codes.

    Parameters
    ----------
    x : Tensor, any shape, floating dtype
        Values; computed in float32.
    scale : Tensor, broadcastable to `x`, finite and > 0
        Step size, in units of `x` per step of the integer grid.
    zero_point : Tensor, broadcastable to `x`, whole numbers of any dtype
        The code of x = 0.
    quant_min, quant_max : int
        Least and greatest code, within [0, 255] or within [-128, 127].

    Returns
    -------
    Tensor, shape as `x`, dtype uint8 if quant_min >= 0, else int8
        Codes in [quant_min, quant_max].

    Raises
    ------
    KernelError
        If shapes do not broadcast to `x`, a scale is zero, negative or not finite, or the range does not fit 8 bits.
    """
    dtype = _code_dtype(quant_min, quant_max)
    if not bool(((scale > 0) & scale.isfinite()).all()):
        raise KernelError(f"scale: got {_worst_scale(scale)}, wanted finite values above 0")
    return _grid(x, scale, zero_point.float(), quant_min, quant_max).to(dtype)


def dequantize_affine(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Give the values that codes stand for: (code - zero_point) * scale.

    Parameters
    ----------
    codes : Tensor, any shape, dtype uint8 or int8
        As from `quantize_affine`.
    scale, zero_point : Tensor, broadcastable to `codes`
        As given to `quantize_affine`.

    Returns
    -------
    Tensor, shape as `codes`, dtype float32

    Raises
    ------
    KernelError
        If shapes do not broadcast to `codes`.
    """
    _check_broadcast(codes, scale, zero_point)
    return codes.float().sub_(zero_point.float()).mul_(scale.float())


def fake_quantize_affine(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int | Tensor,
    output_scale: Tensor | None = None,
) -> Tensor:
    """Quantize and dequantize at once; equals dequantize_affine(quantize_affine(x)) bit for bit.

    Parameters
    ----------
    x, scale, zero_point, quant_min, quant_max
        As for `quantize_affine`. Values of `scale` are not checked: this runs at each forward. `quant_max` may be a
        tensor of whole numbers that broadcasts to `x`: rows of one batch then have different bits.
    output_scale : Tensor, broadcastable to `x`, optional
        The scale that codes are multiplied with, if it is not the one that `x` was divided by: `scale` is then
        output_scale * channel_scale, which divides each channel once and leaves that division to the weights.

    Returns
    -------
    Tensor, shape as `x`, dtype float32
        NaN where `x` is NaN.

    Raises
    ------
    KernelError
        If shapes do not broadcast to `x`, or the range does not fit 8 bits.
    """
    zero_point, factor = zero_point.float(), (scale if output_scale is None else output_scale).float()
    if isinstance(quant_max, Tensor):
        _check_broadcast(x, scale, zero_point)
        codes = (x.float() / scale.float()).round_().add_(zero_point).clamp_(min=quant_min)
        return torch.minimum(codes, quant_max.to(codes)).sub_(zero_point).mul_(factor)
    _code_dtype(quant_min, quant_max)
    return _grid(x, scale, zero_point, quant_min, quant_max).sub_(zero_point).mul_(factor)


def _grid(x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """Codes as float32: clamp(round(x / scale) + zero_point, quant_min, quant_max)."""
    _check_broadcast(x, scale, zero_point)
    return (x.float() / scale.float()).round_().add_(zero_point).clamp_(quant_min, quant_max)


def _check_broadcast(x: Tensor, scale: Tensor, zero_point: Tensor) -> None:
    """Refuse parameters that would change the shape of x."""
    for name, value in (("scale", scale), ("zero_point", zero_point)):
        aligned = zip(reversed(value.shape), reversed(x.shape), strict=False)
        if value.ndim > x.ndim or any(have not in (1, want) for have, want in aligned):
            raise KernelError(f"{name}: got shape {tuple(value.shape)}, wanted one that broadcasts to {tuple(x.shape)}")


def _code_dtype(quant_min: int, quant_max: int) -> torch.dtype:
    """The 8-bit dtype that holds the codes."""
    if 0 <= quant_min <= quant_max <= 255:
        return torch.uint8
    if -128 <= quant_min <= quant_max <= 127:
        return torch.int8
    raise KernelError(f"code range: got [{quant_min}, {quant_max}], wanted one within [0, 255] or [-128, 127]")


def _worst_scale(scale: Tensor) -> float:
    """One offending scale, for the message."""
    bad = ~((scale > 0) & scale.isfinite())
    return float(scale[bad].flatten()[0])
