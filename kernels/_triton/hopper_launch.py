"""Launch `kernels._triton.hopper`: which products it takes, and its descriptors and tiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels._triton.gemm import gate_strides
from kernels._triton.hopper import product_kernel
from kernels._triton.sums import row_sums, window_sums
from kernels._triton.tuned import Tile, chip_of
from kernels.activations import QuantizedActivation
from kernels.conv import ConvGeometry
from kernels.epilogue import EpilogueRows
from kernels.fp8 import FP8, Fp8Matrix
from kernels.weights import PackedWeight, WeightLayout

# TMA copies from addresses and over strides that are multiples of this many bytes.
ALIGNED = 16
# Columns of the widest wgmma that Triton writes for integers, and of any.
WIDEST_INT8, WIDEST = 128, 256
_TYPES = {
    torch.int8: gl.int8,
    torch.uint8: gl.uint8,
    torch.int16: gl.int16,
    FP8: gl.float8e4nv,
    torch.float16: gl.float16,
    torch.bfloat16: gl.bfloat16,
}


@dataclass(frozen=True, slots=True)
class Operands:
    """What the kernel multiplies, and what it adds after; fields as the kernel's arguments."""

    x: Tensor
    weight: Tensor
    x_scale: Tensor
    x_zero: Tensor | None
    x_sum: Tensor | None
    scale: Tensor
    zero: Tensor | None
    total: Tensor | None
    rows: EpilogueRows
    layout: WeightLayout | None = None
    factor: Tensor | None = None


def takes(x: Tensor, weight: Tensor, rows: EpilogueRows, n: int, dtype: torch.dtype) -> bool:
    """Whether operands, (..., K) and (N, taps * K), and outputs lie as TMA needs them, without a low-rank branch."""
    lines = [*x.stride()[:-1], weight.stride(0), n * dtype.itemsize]
    aligned = all(line % ALIGNED == 0 for line in lines) and x.data_ptr() % ALIGNED == weight.data_ptr() % ALIGNED == 0
    # Beside packed weights, what is multiplied and added goes through the output's buffer.
    others = [each.dtype for each in (rows.gate, rows.residual) if each is not None and weight.dtype is torch.uint8]
    aligned = aligned and all(other is dtype for other in others)
    return aligned and x.stride(-1) == 1 and rows.rank == 0 and dtype in (torch.float16, torch.bfloat16)


def takes_weights(weights: Sequence[PackedWeight], tile: Tile) -> bool:
    """Whether a layer's weight is one of 8 bits, with scales of output channels or of groups that the tile divides, or
    one of 4 bits with scales of output channels alone."""
    only = weights[0]
    size = only.layout.group_size
    if only.layout.bits == 4:
        aligned = size == 0 or tile.k % size == 0 or size % tile.k == 0
        return len(weights) == 1 and only.channel is None and not only.layout.has_group_scales and aligned
    grouped = size == 0 or (only.whole is not None and size % tile.k == 0 and only.scale.stride(0) == 1)
    whole = size == 0 or tile.n == largest_power(tile.n)  # no tails with groups
    return len(weights) == 1 and only.channel is None and only.layout.bits == 8 and grouped and whole


def takes_image(x: Tensor, geometry: ConvGeometry) -> bool:
    """Whether a convolution keeps its image's size."""
    plain = geometry.stride == (1, 1) and geometry.dilation == (1, 1)
    return plain and geometry.output_size(*x.shape[1:3]) == tuple(x.shape[1:3])


def linear_int8(x: QuantizedActivation, weight: PackedWeight, rows: EpilogueRows, out: Tensor, tile: Tile) -> None:
    """Multiply (M, K) codes with a weight that `takes_weights`, into `out`, (M, N)."""
    sums = row_sums(x.codes) if has_zero_points(weight) else None
    _launch(_operands(x, weight, sums, rows), out, tile, out.shape[0] // len(x.scale))


def linear_fp8(x: Fp8Matrix, weight: Fp8Matrix, rows: EpilogueRows, out: Tensor, tile: Tile) -> None:
    """Multiply E4M3 rows (M, K) with E4M3 rows (N, K), into `out`, (M, N)."""
    _launch(Operands(x.values, weight.values, x.scale, None, None, weight.scale, None, None, rows), out, tile, 1)


def conv_int8(
    x: QuantizedActivation, weight: PackedWeight, geometry: ConvGeometry, rows: EpilogueRows, out: Tensor, tile: Tile
) -> None:
    """Convolve (B, H, W, C) codes with a weight that `takes_weights`, into `out`, (B, H, W, N)."""
    pixels = out.numel() // out.shape[-1]
    sums = window_sums(row_sums(x.codes), geometry) if has_zero_points(weight) else None
    _launch(_operands(x, weight, sums, rows), out, tile, pixels // len(x.scale), geometry)


def has_zero_points(weight: PackedWeight) -> bool:
    """Whether zero points are still in the numbers that are multiplied."""
    return weight.layout.bits == 8 and not weight.layout.symmetric


def _operands(x: QuantizedActivation, weight: PackedWeight, sums: Tensor | None, rows: EpilogueRows) -> Operands:
    """Return a product's operands, with the corrections that its zero points ask for."""
    x_zero, total = (None, None) if x.symmetric else (x.zero_point, weight.total)
    if total is not None and weight.layout.has_group_scales:
        total = weight.whole
    in_kernel = sums is not None or (weight.layout.bits == 4 and weight.factor is None)
    zero = weight.zero_point if in_kernel else None
    return Operands(
        x.codes, weight.codes, x.scale, x_zero, sums, weight.scale, zero, total, rows, weight.layout, weight.factor
    )  # fmt: skip


def rectangle(pixels: int, height: int, width: int) -> tuple[int, int]:
    """Return height and width, powers of two, of the rectangle of `pixels` that covers an image with least to spare."""
    best, least = (pixels, 1), float("inf")
    across = 1
    while across <= pixels:
        down = pixels // across
        covered = triton.cdiv(height, down) * down * triton.cdiv(width, across) * across
        if covered <= least:
            best, least = (down, across), covered
        across *= 2
    return best


def _launch(o: Operands, out: Tensor, tile: Tile, rows_per_scale: int, geometry: ConvGeometry | None = None) -> None:
    packed = o.layout is not None and o.layout.bits == 4
    # A tail is of columns, or of rows beside packed weights.
    m, n = (largest_power(tile.m), tile.n) if packed else (tile.m, largest_power(tile.n))
    tail, columns, channels = tile.m - m + tile.n - n, out.shape[-1], o.x.shape[-1]
    kernel = (1, 1) if geometry is None else geometry.kernel
    tap_bytes = o.weight.shape[1] // (kernel[0] * kernel[1])
    if geometry is None:
        x_block, out_block, height, width = [m, tile.k], [m], 1, 1
        tiles_m, tiles_h, tiles_w = triton.cdiv(out.shape[0], tile.m), 1, 1
    else:
        height, width = out.shape[1:3]
        down, across = rectangle(m, height, width)
        x_block, out_block = [1, down, across, tile.k], [1, down, across]
        tiles_h, tiles_w = triton.cdiv(height, down), triton.cdiv(width, across)
        tiles_m = out.shape[0] * tiles_h * tiles_w
    tiles = tiles_m * triton.cdiv(columns, tile.n)
    programs = chip_of(out.device).processors * tile.per_processor
    is_int = o.x.dtype is torch.int8
    residual, gate = o.rows.residual, o.rows.gate
    group = 0 if o.layout is None else o.layout.group_size
    factors = None if o.factor is None else _descriptor(o.factor, [group_rows(group, tile.k), n])
    tails = (None, None)
    if tail:
        other, tail_block = (o.x, [tail, n]) if packed else (o.weight, [*out_block, tail])
        tails = (_descriptor(other, [tail, tile.k]), _descriptor(out, tail_block))
    product_kernel[(min(tiles, programs),)](
        _descriptor(o.x, x_block), _descriptor(o.weight, [n, tile.k // 2 if packed else tile.k]),
        _descriptor(out, [*out_block, n // tile.halves]), *tails, factors,
        o.x_scale, o.x_zero, o.x_sum, o.scale, o.zero, o.total, o.rows.bias, gate, residual,
        out.numel() // columns, columns, channels, tiles_m, tiles_h, tiles_w, height, width, tap_bytes,
        1 if o.layout is None else o.layout.groups_per_tap, rows_per_scale,
        *gate_strides(o.rows, out.shape[0]),
        0 if residual is None else residual.stride(0), SUM=gl.int32 if is_int else gl.float32,
        LAYOUT=instruction_layout(tile.warps, m if packed else n, is_int),
        GROUP_SIZE=group, LANE=0 if o.layout is None else o.layout.lane, TAPS_H=kernel[0], TAPS_W=kernel[1],
        PAD_H=0 if geometry is None else geometry.padding[0], PAD_W=0 if geometry is None else geometry.padding[1],
        BLOCK_M=m, BLOCK_N=n, BLOCK_K=tile.k, HALVES=tile.halves, SWIZZLE=tile.swizzle, STAGES=tile.stages,
        TAIL=tail, TAIL_LAYOUT=instruction_layout(tile.warps, tail or n, is_int),
        num_warps=tile.warps, maxnreg=registers(tile), enable_fp_fusion=False,
    )  # fmt: skip


def instruction_layout(warps: int, columns: int, is_int: bool) -> gl.NVMMADistributedLayout:
    """Return how registers hold the sums of a tile of so many columns."""
    widest = WIDEST_INT8 if is_int else WIDEST
    return gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[warps, 1], instr_shape=[16, min(columns, widest), 32]
    )  # fmt: skip


def group_rows(group_size: int, k: int) -> int:
    """Return how many groups of columns a step of `k` columns reads."""
    return max(1, k // group_size)


def largest_power(columns: int) -> int:
    """Return the largest power of two in a number of columns; what is left is a tile's tail."""
    return 1 << (columns.bit_length() - 1)


def registers(tile: Tile) -> int | None:
    """Return how many registers a thread may have, so that as many programs as the tile says share a multiprocessor."""
    most = 65536 // (32 * tile.warps * tile.per_processor) // 8 * 8
    return most if most < 255 else None


def _descriptor(tensor: Tensor, block: list[int]) -> TensorDescriptor:
    return TensorDescriptor(
        tensor, list(tensor.shape), list(tensor.stride()), block, _layout(tuple(block), tensor.dtype)
    )


@lru_cache
def _layout(block: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """Return how TMA lays a block out in shared memory."""
    return gl.NVMMASharedLayout.get_default_for(list(block), _TYPES[dtype])
