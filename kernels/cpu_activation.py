"""Activations for the CPU's integer operators: uint8 codes with one grid, or one for each sample.

Images are padded before they are multiplied, with the code of 0.0, which is the zero point. So oneDNN is told of no
zero point: it would go through all weights at every call to correct for one, which takes longer than the layer where
images are small. What the zero point adds to a sum is then the same at all positions, and `kernels.cpu` has it in the
bias.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.activations import ActivationTable, QuantizedActivation, dynamic_grid, gather_steps

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
    shift : Tensor, shape (R, 1), dtype float32
        scale * zero_point.
    zero : int or None
        The zero point, if it is one and known to the host.
    """

    scale: Tensor
    zero_point: Tensor
    step: Tensor
    offset: Tensor
    shift: Tensor
    zero: int | None = None


def cpu_grid(table: ActivationTable, index: Tensor | None = None) -> CpuGrid:
    """Look up the grids of steps `index`, shape () or (B,), dtype int64; None if the table has one entry."""
    scale, zero = gather_steps(table.scale, index), gather_steps(table.zero_point, index)
    step = gather_steps(table.scale if table.divisor is None else table.divisor, index).view(len(scale), 1, -1)
    known = int(zero) if zero.numel() == 1 and not torch.compiler.is_compiling() else None
    shift = (scale * zero)[:, None]
    return CpuGrid(scale, zero.to(torch.int32), step, (zero - 128).view(-1, 1, 1), shift, known)


@dataclass(frozen=True, slots=True)
class CpuActivation(QuantizedActivation):
    """As its base, perhaps padded, with what asymmetric 8-bit weights need.

    Attributes
    ----------
    padding : tuple of int
        Rows and columns of zero points that `codes`, (B, H, W, C), have on each side.
    sums : Tensor, shape `codes.shape[:-1]`, perhaps less the padding, dtype float32, or None
        Sum of code - 128 over the channels of each position; None: to be found where it is needed.
    grid : CpuGrid or None
        What the codes were made with, if known.
    """

    padding: tuple[int, int] = (0, 0)
    sums: Tensor | None = None
    grid: CpuGrid | None = None


def quantize_cpu(
    x: Tensor, grid: CpuGrid, bits: int, *, with_sums: bool = False, padding: tuple[int, int] = (0, 0)
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

    Returns
    -------
    CpuActivation
        uint8 codes, unsigned zero points, R is 1 or B.
    """
    if grid.zero is not None and not torch.compiler.is_compiling():
        codes, sums = _codes_in_blocks(x.contiguous(), grid, bits, with_sums, padding)
        return CpuActivation(codes, grid.scale, grid.zero_point, False, padding, sums, grid)
    if padding != (0, 0):
        x = F.pad(x, (0, 0, padding[1], padding[1], padding[0], padding[0]))
    runs = x.reshape(grid.scale.numel(), -1, x.shape[-1])
    if not torch.compiler.is_compiling():
        codes = _unsigned_codes(runs, grid.step, grid.offset, bits).view(x.shape)
        return CpuActivation(codes, grid.scale, grid.zero_point, False, padding, None, grid)
    # One loop, once compiled.
    values = ((runs.float() / grid.step).round() + grid.offset).clamp(-128, 2**bits - 129)
    sums = values.sum(-1).view(x.shape[:-1]) if with_sums else None
    codes = (values + 128).to(torch.uint8).view(x.shape)
    return CpuActivation(codes, grid.scale, grid.zero_point, False, padding, sums, grid)


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


def pad_codes(x: QuantizedActivation, padding: tuple[int, int]) -> QuantizedActivation:
    """Return codes (B, H, W, C) with `padding` rows and columns of their zero points on each side."""
    if padding == (0, 0) or (isinstance(x, CpuActivation) and x.padding == padding):
        return x
    batch, height, width, channels = x.codes.shape
    zero = x.zero_point.to(torch.uint8).view(-1, 1, 1, 1)
    padded = zero.expand(-1, height + 2 * padding[0], width + 2 * padding[1], channels)
    padded = padded.repeat_interleave(batch // len(zero), 0)
    _interior(padded, padding).copy_(x.codes)
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
    known = x.sums if isinstance(x, CpuActivation) else None
    if known is None:
        known = x.codes.bitwise_xor(0x80).view(torch.int8).sum(-1, dtype=torch.float32)
    left_out = (0, 0)
    if isinstance(x, CpuActivation) and known.dim() > 1 and known.shape[1] != x.codes.shape[1]:
        left_out = x.padding
    if isinstance(x, CpuActivation) and x.grid is not None and x.grid.zero is not None:
        return known - (x.grid.zero - 128) * x.codes.shape[-1], left_out
    runs = known.view(x.scale.numel(), -1)
    sums = torch.sub(runs, (x.zero_point - 128)[:, None], alpha=x.codes.shape[-1])
    return sums.view(known.shape), left_out


def _unsigned_codes(x: Tensor, step: Tensor, offset: Tensor, bits: int) -> Tensor:
    """Codes of `kernels.affine`, uint8, for a zero point less 128.

    By way of int8: PyTorch converts floats to it with vector instructions, to uint8 one by one, which takes longer than
    all the rest.
    """
    signed = (x.float() / step).round_().add_(offset).clamp_(-128, 2**bits - 129).to(torch.int8)
    return signed.view(torch.uint8).bitwise_xor_(0x80)


def _codes_in_blocks(
    x: Tensor, grid: CpuGrid, bits: int, with_sums: bool, padding: tuple[int, int]
) -> tuple[Tensor, Tensor | None]:
    """Return `_unsigned_codes` of contiguous `x`, padded, and the sums of positions, with one grid for all of it."""
    assert grid.zero is not None
    step, offset, top = grid.step.view(-1), grid.zero - 128, 2**bits - 129
    sums: Tensor | None
    if padding == (0, 0):
        signed = target = torch.empty(x.shape, dtype=torch.int8)
    else:
        batch, height, width, channels = x.shape
        shape = (batch, height + 2 * padding[0], width + 2 * padding[1], channels)
        signed = torch.full(shape, offset, dtype=torch.int8)
        target = _interior(signed, padding)
    if x.numel() <= _BLOCK:
        values = torch.div(x, step).round_().add_(offset).clamp_(-128, top)
        target.copy_(values)
        sums = values.sum(-1) if with_sums else None
        return signed.view(torch.uint8).bitwise_xor_(0x80), sums
    sums = torch.empty(x.shape[:-1]) if with_sums else None
    scratch = torch.empty(min(x.numel(), max(_BLOCK, x.shape[-1])))
    for part in _blocks(x.shape):
        source = x[part]
        values = torch.div(source, step, out=scratch[: source.numel()].view(source.shape))
        target[part].copy_(values.round_().add_(offset).clamp_(-128, top))
        if sums is not None:
            torch.sum(values, -1, out=sums[part])
    return signed.view(torch.uint8).bitwise_xor_(0x80), sums


def _blocks(shape: torch.Size) -> Iterator[tuple[int | slice, ...]]:
    """Yield indices of parts of a tensor, in order, of `_BLOCK` elements at most (or one row of channels)."""
    each = math.prod(shape[1:])
    if len(shape) == 1:
        yield (slice(None),)
    elif each <= _BLOCK:
        count = _BLOCK // each
        for start in range(0, shape[0], count):
            yield (slice(start, start + count),)
    else:
        for i in range(shape[0]):
            for part in _blocks(shape[1:]):
                yield (i, *part)


def _interior(padded: Tensor, padding: tuple[int, int]) -> Tensor:
    """View (B, H, W, C) without its padding."""
    height, width = padded.shape[1] - 2 * padding[0], padded.shape[2] - 2 * padding[1]
    return padded.narrow(1, padding[0], height).narrow(2, padding[1], width)
