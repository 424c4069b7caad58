"""Layers whose output channels have different widths, packed, in one launch.

Records of one stored width are put together when weights are laid out (`kernels.weights.join_widths`), so there are at
most three: 2, 4 and 8 bits. A program has a tile of one of them, and loops over K as `gemm` and `conv` do.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._triton.blocks import Blocks, architecture, int_blocks, rank_block
from kernels._triton.common import tile_of
from kernels._triton.int_tiles import conv_tile, int_tile
from kernels.activations import QuantizedActivation
from kernels.conv import ConvGeometry
from kernels.epilogue import EpilogueRows
from kernels.weights import MIN_LANE, PackedWeight, WeightLayout

WIDTHS = (2, 4, 8)
# 8-bit rows are padded to a multiple of it.
ROW8 = tl.constexpr(MIN_LANE)


@triton.jit
def linear_widths_kernel(
    x_ptr,
    x_scale_ptr,
    x_zero_ptr,
    w2_ptr,  # (N2, bytes), or None: rows that are stored in 2 bits; the next ones are theirs, as of `int_tile`
    scale2_ptr,
    zero2_ptr,
    factor2_ptr,
    total2_ptr,
    channel2_ptr,
    w4_ptr,  # (N4, bytes), or None
    scale4_ptr,
    zero4_ptr,
    factor4_ptr,
    total4_ptr,
    channel4_ptr,
    w8_ptr,  # (N8, bytes), or None
    scale8_ptr,
    zero8_ptr,
    total8_ptr,
    channel8_ptr,
    bias_ptr,
    residual_ptr,
    down_ptr,
    up_ptr,
    out_ptr,
    M,
    N2,
    N4,
    N8,
    K,
    groups,
    rows_per_scale,
    stride_x,
    stride_residual,
    stride_out,
    LANE2: tl.constexpr,
    LANE4: tl.constexpr,
    LANE8: tl.constexpr,
    GROUP2: tl.constexpr,
    GROUP4: tl.constexpr,
    GROUP8: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    X_SYMMETRIC: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SWIZZLE: tl.constexpr,
):
    """Tiles of `int_tile` for all rows of a layer whose rows have different widths; a tile's have one."""
    tiles_2, tiles_4, tiles_8 = tl.cdiv(N2, BLOCK_N), tl.cdiv(N4, BLOCK_N), tl.cdiv(N8, BLOCK_N)
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tiles_2 + tiles_4 + tiles_8, SWIZZLE)
    if w2_ptr is not None:  # noqa: SIM102 (one is known to the compiler)
        if tile_n < tiles_2:
            blocks = tl.cdiv(K, LANE2 * 4)
            int_tile(
                tile_m, tile_n, x_ptr, x_scale_ptr, x_zero_ptr, w2_ptr, scale2_ptr, zero2_ptr, factor2_ptr,
                total2_ptr, channel2_ptr, bias_ptr, residual_ptr, down_ptr, up_ptr, out_ptr, M, N2, K, blocks, groups,
                rows_per_scale, stride_x, blocks * LANE2, stride_residual, stride_out, 2, LANE2, GROUP2, False,
                X_SYMMETRIC, RANK, BLOCK_M, BLOCK_N, BLOCK_R,
            )  # fmt: skip
    tile_n -= tiles_2
    if w4_ptr is not None:  # noqa: SIM102 (one is known to the compiler)
        if (tile_n >= 0) & (tile_n < tiles_4):
            blocks = tl.cdiv(K, LANE4 * 2)
            int_tile(
                tile_m, tile_n, x_ptr, x_scale_ptr, x_zero_ptr, w4_ptr, scale4_ptr, zero4_ptr, factor4_ptr,
                total4_ptr, channel4_ptr, bias_ptr, residual_ptr, down_ptr, up_ptr, out_ptr, M, N4, K, blocks, groups,
                rows_per_scale, stride_x, blocks * LANE4, stride_residual, stride_out, 4, LANE4, GROUP4, False,
                X_SYMMETRIC, RANK, BLOCK_M, BLOCK_N, BLOCK_R,
            )  # fmt: skip
    tile_n -= tiles_4
    if w8_ptr is not None:  # noqa: SIM102 (one is known to the compiler)
        if tile_n >= 0:
            int_tile(
                tile_m, tile_n, x_ptr, x_scale_ptr, x_zero_ptr, w8_ptr, scale8_ptr, zero8_ptr, None, total8_ptr,
                channel8_ptr, bias_ptr, residual_ptr, down_ptr, up_ptr, out_ptr, M, N8, K, tl.cdiv(K, LANE8), groups,
                rows_per_scale, stride_x, tl.cdiv(K, ROW8) * ROW8, stride_residual, stride_out, 8, LANE8, GROUP8,
                SYMMETRIC, X_SYMMETRIC, RANK, BLOCK_M, BLOCK_N, BLOCK_R,
            )  # fmt: skip


@triton.jit
def conv2d_widths_kernel(
    x_ptr,
    x_scale_ptr,
    x_zero_ptr,
    w2_ptr,  # (N2, taps * bytes), or None: the next ones as of `linear_widths_kernel`
    scale2_ptr,
    zero2_ptr,
    factor2_ptr,
    total2_ptr,
    channel2_ptr,
    w4_ptr,
    scale4_ptr,
    zero4_ptr,
    factor4_ptr,
    total4_ptr,
    channel4_ptr,
    w8_ptr,
    scale8_ptr,
    zero8_ptr,
    total8_ptr,
    channel8_ptr,
    bias_ptr,
    residual_ptr,
    down_ptr,
    up_ptr,
    out_ptr,
    M,
    N2,
    N4,
    N8,
    C,
    H,
    W,
    OH,
    OW,
    groups_per_tap,
    rows_per_scale,
    stride_b,
    stride_h,
    stride_w_in,
    stride_residual,
    stride_out,
    TAPS_H: tl.constexpr,
    TAPS_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    LANE2: tl.constexpr,
    LANE4: tl.constexpr,
    LANE8: tl.constexpr,
    GROUP2: tl.constexpr,
    GROUP4: tl.constexpr,
    GROUP8: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    X_SYMMETRIC: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SWIZZLE: tl.constexpr,
):
    """Tiles of `conv_tile` for all rows of a layer whose rows have different widths; a tile's have one."""
    tiles_2, tiles_4, tiles_8 = tl.cdiv(N2, BLOCK_N), tl.cdiv(N4, BLOCK_N), tl.cdiv(N8, BLOCK_N)
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tiles_2 + tiles_4 + tiles_8, SWIZZLE)
    if w2_ptr is not None:  # noqa: SIM102 (one is known to the compiler)
        if tile_n < tiles_2:
            blocks = tl.cdiv(C, LANE2 * 4)
            conv_tile(
                tile_m, tile_n, x_ptr, x_scale_ptr, x_zero_ptr, w2_ptr, scale2_ptr, zero2_ptr, factor2_ptr,
                total2_ptr, channel2_ptr, bias_ptr, residual_ptr, down_ptr, up_ptr, out_ptr, M, N2, C, H, W, OH, OW,
                blocks, groups_per_tap, rows_per_scale, stride_b, stride_h, stride_w_in, blocks * LANE2,
                stride_residual, stride_out, TAPS_H, TAPS_W, STRIDE_H, STRIDE_W, PAD_H, PAD_W, DILATION_H, DILATION_W,
                2, LANE2, GROUP2, False, X_SYMMETRIC, RANK, BLOCK_M, BLOCK_N, BLOCK_R,
            )  # fmt: skip
    tile_n -= tiles_2
    if w4_ptr is not None:  # noqa: SIM102 (one is known to the compiler)
        if (tile_n >= 0) & (tile_n < tiles_4):
            blocks = tl.cdiv(C, LANE4 * 2)
            conv_tile(
                tile_m, tile_n, x_ptr, x_scale_ptr, x_zero_ptr, w4_ptr, scale4_ptr, zero4_ptr, factor4_ptr,
                total4_ptr, channel4_ptr, bias_ptr, residual_ptr, down_ptr, up_ptr, out_ptr, M, N4, C, H, W, OH, OW,
                blocks, groups_per_tap, rows_per_scale, stride_b, stride_h, stride_w_in, blocks * LANE4,
                stride_residual, stride_out, TAPS_H, TAPS_W, STRIDE_H, STRIDE_W, PAD_H, PAD_W, DILATION_H, DILATION_W,
                4, LANE4, GROUP4, False, X_SYMMETRIC, RANK, BLOCK_M, BLOCK_N, BLOCK_R,
            )  # fmt: skip
    tile_n -= tiles_4
    if w8_ptr is not None:  # noqa: SIM102 (one is known to the compiler)
        if tile_n >= 0:
            conv_tile(
                tile_m, tile_n, x_ptr, x_scale_ptr, x_zero_ptr, w8_ptr, scale8_ptr, zero8_ptr, None,
                total8_ptr, channel8_ptr, bias_ptr, residual_ptr, down_ptr, up_ptr, out_ptr, M, N8, C, H, W, OH, OW,
                tl.cdiv(C, LANE8), groups_per_tap, rows_per_scale, stride_b, stride_h, stride_w_in,
                tl.cdiv(C, ROW8) * ROW8, stride_residual, stride_out, TAPS_H, TAPS_W, STRIDE_H, STRIDE_W, PAD_H, PAD_W,
                DILATION_H, DILATION_W, 8, LANE8, GROUP8, SYMMETRIC, X_SYMMETRIC, RANK, BLOCK_M, BLOCK_N, BLOCK_R,
            )  # fmt: skip


def takes_widths(weights: Sequence[PackedWeight], arch: str) -> bool:
    """Whether records are of different stored widths, each once, with groups of one size.

    On sm_80 products of groups are a launch for each width: prepared in registers before mma.sync, they would spill.
    """
    if arch == "sm_80" and any(weight.layout.multiplied for weight in weights):
        return False
    widths = [weight.layout.bits for weight in weights]
    groups = {weight.layout.group_size for weight in weights} - {0}
    return 1 < len(widths) == len(set(widths)) and len(groups) <= 1


def launch_linear_widths(
    x: QuantizedActivation, weights: Sequence[PackedWeight], rows: EpilogueRows, out: Tensor
) -> None:
    """Multiply (M, K) codes with records that `takes_widths`, into `out`, (M, N)."""
    m, columns = x.codes.shape
    blocks, sections, constants = _prepare(weights, m, rows, out.device)
    linear_widths_kernel[_grid(weights, m, blocks)](
        x.codes, x.scale, x.zero_point, *sections, rows.bias, rows.residual, rows.down, rows.up, out,
        m, *_counts(weights), columns, max(weight.layout.groups for weight in weights), m // len(x.scale),
        x.codes.stride(0), _stride(rows), out.shape[-1], X_SYMMETRIC=x.symmetric, **constants,
    )  # fmt: skip


def launch_conv2d_widths(
    x: QuantizedActivation, weights: Sequence[PackedWeight], geometry: ConvGeometry, rows: EpilogueRows, out: Tensor
) -> None:
    """Convolve (B, H, W, C) codes with records that `takes_widths`, into `out`, (B, OH, OW, N)."""
    batch, out_h, out_w, columns = out.shape
    m, (_, height, width, channels) = batch * out_h * out_w, x.codes.shape
    blocks, sections, constants = _prepare(weights, m, rows, out.device)
    conv2d_widths_kernel[_grid(weights, m, blocks)](
        x.codes, x.scale, x.zero_point, *sections, rows.bias, rows.residual, rows.down, rows.up, out,
        m, *_counts(weights), channels, height, width, out_h, out_w,
        max(weight.layout.groups_per_tap for weight in weights), m // len(x.scale),
        x.codes.stride(0), x.codes.stride(1), x.codes.stride(2), _stride(rows), columns,
        TAPS_H=geometry.kernel[0], TAPS_W=geometry.kernel[1], STRIDE_H=geometry.stride[0],
        STRIDE_W=geometry.stride[1], PAD_H=geometry.padding[0], PAD_W=geometry.padding[1],
        DILATION_H=geometry.dilation[0], DILATION_W=geometry.dilation[1], X_SYMMETRIC=x.symmetric, **constants,
    )  # fmt: skip


def _prepare(
    weights: Sequence[PackedWeight], m: int, rows: EpilogueRows, device: torch.device
) -> tuple[Blocks, list[Tensor | None], dict[str, Any]]:
    """Return the blocks of all tiles, the records' tensors in a kernel's order, and what it is compiled for."""
    arch, by_width = architecture(device), {weight.layout.bits: weight for weight in weights}
    layouts = [weight.layout for weight in weights]
    blocks = widths_blocks(arch, m, sum(weight.rows for weight in weights), layouts)
    tensors: list[Tensor | None] = []
    for bits in WIDTHS:
        w = by_width.get(bits)
        # Of 8 bits, products are stored: there are no multipliers.
        more = (None,) if bits < 8 else ()
        if w is None:
            tensors += [None, None, None, *more, None, None]
            continue
        factor = (w.factor,) if bits < 8 else ()
        tensors += [w.codes, w.scale.contiguous(), w.zero_point, *factor, w.total, w.channel]
    constants = {
        **layout_constants(layouts, blocks.k), "RANK": rows.rank, "BLOCK_M": blocks.m,
        "BLOCK_N": blocks.n, "BLOCK_R": rank_block(rows.rank), "SWIZZLE": blocks.swizzle, "num_warps": blocks.warps,
        "num_stages": blocks.stages, "enable_fp_fusion": False,
    }  # fmt: skip
    return blocks, tensors, constants


def widths_blocks(arch: str, m: int, n: int, layouts: Sequence[WeightLayout]) -> Blocks:
    """Blocks of a layer of several widths: those that suit a gathered epilogue, with the least K of all records."""
    return min((int_blocks(arch, m, n, layout, heavy=True) for layout in layouts), key=lambda each: each.k)


def layout_constants(layouts: Iterable[WeightLayout], k: int) -> dict[str, Any]:
    """Return what the layouts of records fix in a kernel that reads `k` codes of 8 bits at a time."""
    lanes, groups, symmetric = dict.fromkeys(WIDTHS, MIN_LANE), dict.fromkeys(WIDTHS, 0), True
    for layout in layouts:
        lanes[layout.bits] = k if layout.bits == 8 else layout.lane
        groups[layout.bits] = layout.group_size
        symmetric = layout.symmetric if layout.bits == 8 else symmetric
    named = {f"LANE{bits}": lanes[bits] for bits in WIDTHS} | {f"GROUP{bits}": groups[bits] for bits in WIDTHS}
    return {**named, "SYMMETRIC": symmetric}


def _counts(weights: Sequence[PackedWeight]) -> list[int]:
    """Rows of each width."""
    by_width = {weight.layout.bits: weight.rows for weight in weights}
    return [by_width.get(bits, 0) for bits in WIDTHS]


def _grid(weights: Sequence[PackedWeight], m: int, blocks: Blocks) -> tuple[int]:
    """Programs: each width's rows in tiles of their own."""
    return (triton.cdiv(m, blocks.m) * sum(triton.cdiv(count, blocks.n) for count in _counts(weights)),)


def _stride(rows: EpilogueRows) -> int:
    return 0 if rows.residual is None else rows.residual.stride(0)
