"""Activations for the CPU's integer operators: uint8 codes with one grid, or one for each sample.

Images are padded before they are multiplied, with the code of 0.0, which is the zero point. So oneDNN is told of no
zero point: it would go through all weights at every call to correct for one, which takes longer than the layer where
images are small. What the zero point adds to a sum is then the same at all positions, and `kernels.cpu` has it in the
bias.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import native
from kernels.activations import ActivationTable, QuantizedActivation, dynamic_grid, gather_steps
from kernels.differences import Held
from kernels.norms import GroupNorm, group_norm_reference


@dataclass(frozen=True, slots=True)
class CpuGrid:
    """The grid of each of R equal runs of rows, ready to quantize with.

    Attributes
    ----------
    scale : Tensor, shape (R,), dtype float32
    zero_point : Tensor, shape (R,), dtype int32
    step : Tensor, shape (R, 1, 1) or (R, 1, C), dtype float32
        What a channel is divided by.
    shift : Tensor, shape (R, 1), dtype float32
        scale * zero_point.
    """

    scale: Tensor
    zero_point: Tensor
    step: Tensor
    shift: Tensor


def cpu_grid(table: ActivationTable, index: Tensor | None = None) -> CpuGrid:
    """Look up the grids of steps `index`, shape () or (B,), dtype int64; None if the table has one entry."""
    scale, zero = gather_steps(table.scale, index), gather_steps(table.zero_point, index)
    step = gather_steps(table.scale if table.divisor is None else table.divisor, index)
    return _grid(scale, zero, step.view(len(scale), 1, -1))


@dataclass(frozen=True, slots=True)
class CpuActivation(QuantizedActivation):
    """As its base, perhaps padded, with what asymmetric 8-bit weights need.

    Attributes
    ----------
    padding : tuple of int
        Rows and columns of zero points that `codes`, (B, H, W, C), have on each side.
    sums : Tensor, shape `codes.shape[:-1]`, perhaps less the padding, dtype float32, or None
        Sum of code - zero point over the channels of each position; None: to be found where it is needed.
    grid : CpuGrid or None
        What the codes were made with, if known.
    """

    padding: tuple[int, int] = (0, 0)
    sums: Tensor | None = None
    grid: CpuGrid | None = None


def quantize_cpu(
    x: Tensor,
    grid: CpuGrid,
    bits: int,
    *,
    with_sums: bool = False,
    padding: tuple[int, int] = (0, 0),
    norm: GroupNorm | None = None,
    silu: bool = False,
    held: Held | None = None,
) -> CpuActivation:
    """Quantize to uint8 codes of `bits` bits.

    Parameters
    ----------
    x : Tensor, shape (..., C), floating dtype
    grid : CpuGrid
    bits : int
    with_sums : bool
        Sum the codes of each position, as `CpuWeight.correction` needs it, while they are in the cache.
    padding : tuple of int
        Rows and columns to put on each side of an image (B, H, W, C).
    norm : GroupNorm, optional
        To normalize an image with first, in float32.
    silu : bool
        Quantize the SiLU of the normalized image.
    held : Held, optional
        Quantize the difference to what is held, and add what the codes stand for; R is 1 then.

    Returns
    -------
    CpuActivation
        uint8 codes, unsigned zero points, R is 1 or B.
    """
    if native.is_usable():
        codes, sums = native.quantize(
            x, grid.step, grid.zero_point, bits, with_sums=with_sums, padding=padding, norm=norm, silu=silu, held=held
        )
        return CpuActivation(codes, grid.scale, grid.zero_point, False, padding, sums, grid)
    if norm is not None:
        x = group_norm_reference(x, norm.groups, norm.weight, norm.bias, norm.eps, silu)
    if held is not None:
        held.check(x)
        x = held.difference(x)
    if padding != (0, 0):
        x = F.pad(x, (0, 0, padding[1], padding[1], padding[0], padding[0]))
    runs = x.reshape(grid.scale.numel(), -1, x.shape[-1])
    offset = (grid.zero_point - 128).view(-1, 1, 1)
    # By way of int8: PyTorch converts floats to it with vector instructions, to uint8 one by one.
    values = ((runs.float() / grid.step).round() + offset).clamp(-128, 2**bits - 129)
    sums = (values - offset).sum(-1).view(x.shape[:-1]) if with_sums else None
    codes = values.to(torch.int8).view(torch.uint8).bitwise_xor(0x80).view(x.shape)
    if held is not None:
        held.add(interior(codes, padding), grid.zero_point)
    return CpuActivation(codes, grid.scale, grid.zero_point, False, padding, sums, grid)


def quantize_cpu_dynamic(
    x: Tensor, bits: int, *, symmetric: bool, channel_scale: Tensor | None = None
) -> QuantizedActivation:
    """Quantize to uint8 codes with the range of each sample (first dimension); else as `quantize_dynamic`."""
    runs = x.reshape(x.shape[0], -1, x.shape[-1]).float()
    scale, zero, divisor = dynamic_grid(runs, bits, symmetric, channel_scale)
    return quantize_cpu(x, _grid(scale, zero, divisor), bits)


def pad_codes(x: QuantizedActivation, padding: tuple[int, int]) -> QuantizedActivation:
    """Return codes (B, H, W, C) with `padding` rows and columns of their zero points on each side."""
    if padding == (0, 0) or (isinstance(x, CpuActivation) and x.padding == padding):
        return x
    batch, height, width, channels = x.codes.shape
    zero = x.zero_point.to(torch.uint8).view(-1, 1, 1, 1)
    padded = zero.expand(-1, height + 2 * padding[0], width + 2 * padding[1], channels)
    padded = padded.repeat_interleave(batch // len(zero), 0)
    interior(padded, padding).copy_(x.codes)
    grid = x.grid if isinstance(x, CpuActivation) else None
    return CpuActivation(padded, x.scale, x.zero_point, x.symmetric, padding, None, grid)


def position_sums(x: QuantizedActivation) -> tuple[Tensor, tuple[int, int]]:
    """Return the sum of code - zero point over the channels of each position, and the padding that is not in it.

    Returns
    -------
    Tensor, shape `codes.shape[:-1]`, dtype float32
        Whole numbers. The padding's are 0, so they may be left out.
    tuple of int
        Rows and columns on each side that were left out.
    """
    if isinstance(x, CpuActivation) and x.sums is not None:
        return x.sums, x.padding if x.sums.shape != x.codes.shape[:-1] else (0, 0)
    signed = x.codes.bitwise_xor(0x80).view(torch.int8).sum(-1, dtype=torch.float32)
    runs = signed.view(x.scale.numel(), -1)
    return torch.sub(runs, (x.zero_point - 128)[:, None], alpha=x.codes.shape[-1]).view(signed.shape), (0, 0)


def _grid(scale: Tensor, zero_point: Tensor, step: Tensor) -> CpuGrid:
    """Prepare the grids of R runs, with `step` of shape (R, 1, 1) or (R, 1, C)."""
    return CpuGrid(scale, zero_point.to(torch.int32), step, (scale * zero_point)[:, None])


def interior(padded: Tensor, padding: tuple[int, int]) -> Tensor:
    """View (B, H, W, C), or any codes that are not padded, without the padding."""
    if padding == (0, 0):
        return padded
    height, width = padded.shape[1] - 2 * padding[0], padded.shape[2] - 2 * padding[1]
    return padded.narrow(1, padding[0], height).narrow(2, padding[1], width)
