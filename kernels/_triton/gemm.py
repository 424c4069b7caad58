"""Triton twin of `kernels.gemm`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._triton.blocks import (
    architecture,
    float_blocks,
    float_precision,
    int_blocks,
    is_grouped,
    rank_block,
    splits_of_k,
)
from kernels._triton.common import factor_of, finish_tile, lane_of, tile_of
from kernels._triton.int_tiles import int_tile
from kernels._triton.tuned import HOPPER, Shape, Tile, operator_of, tuned_tile
from kernels._triton.widths import launch_linear_widths, takes_widths
from kernels.activations import QuantizedActivation
from kernels.epilogue import EpilogueRows, add_gated, without_gate
from kernels.weights import PackedWeight


@triton.jit
def linear_int_kernel(
    x_ptr,  # (M, K) int8 codes
    x_scale_ptr,  # (R,) float32
    x_zero_ptr,  # (R,) int32
    w_ptr,  # (N, blocks * LANE) packed codes
    scale_ptr,  # (N, G), or (N, 1) where groups have multipliers
    zero_ptr,  # (N, G) int8, without multipliers
    factor_ptr,  # (G, N) int16 or None
    total_ptr,  # as scale_ptr
    channel_ptr,  # (N,) int32 or None
    bias_ptr,
    residual_ptr,
    down_ptr,
    up_ptr,
    out_ptr,
    M,
    N,
    K,
    blocks,
    groups,
    rows_per_scale,
    stride_x,
    stride_w,
    stride_residual,
    stride_out,
    BITS: tl.constexpr,
    LANE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    X_SYMMETRIC: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SWIZZLE: tl.constexpr,
):
    """Tiles of `int_tile` for all rows of a weight."""
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), SWIZZLE)
    int_tile(
        tile_m, tile_n, x_ptr, x_scale_ptr, x_zero_ptr, w_ptr, scale_ptr, zero_ptr, factor_ptr, total_ptr,
        channel_ptr, bias_ptr, residual_ptr, down_ptr, up_ptr, out_ptr, M, N, K, blocks, groups, rows_per_scale,
        stride_x, stride_w, stride_residual, stride_out, BITS, LANE, GROUP_SIZE, SYMMETRIC, X_SYMMETRIC, RANK, BLOCK_M,
        BLOCK_N, BLOCK_R,
    )  # fmt: skip


@triton.jit
def linear_float_kernel(
    x_ptr,  # (M, K) float16, bfloat16 or float32
    w_ptr,
    scale_ptr,
    zero_ptr,
    factor_ptr,
    channel_ptr,
    bias_ptr,
    residual_ptr,
    down_ptr,
    up_ptr,
    out_ptr,
    partial_ptr,  # (SPLITS, M, N) float32 or None: what sum_splits_kernel adds up
    M,
    N,
    K,
    blocks,
    groups,
    stride_x,
    stride_w,
    stride_residual,
    stride_out,
    BITS: tl.constexpr,
    LANE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SPLITS: tl.constexpr,
    SWIZZLE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of floats times codes: code - zero point is exact in the activation's dtype, scales follow the dot."""
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), SWIZZLE)
    split = tl.program_id(1)
    m = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, LANE)
    in_m, in_n = m < M, n < N
    x_rows = (x_ptr + m * stride_x)[:, None]
    w_rows = (w_ptr + n.to(tl.int64) * stride_w)[None, :]
    PER_BYTE: tl.constexpr = 8 // BITS
    GROUPED: tl.constexpr = GROUP_SIZE > 0
    SCALED: tl.constexpr = GROUPED and factor_ptr is None
    value = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if not GROUPED:
        zero = tl.load(zero_ptr + n, mask=in_n, other=0).to(tl.int32)
    per_split = tl.cdiv(blocks, SPLITS)
    for block in range(split * per_split, tl.minimum((split + 1) * per_split, blocks)):
        byte = block * LANE + lane
        packed = tl.load(w_rows + byte[:, None], mask=in_n[None, :] & (byte[:, None] < stride_w), other=0)
        for i in tl.static_range(PER_BYTE):
            first = (block * PER_BYTE + i) * LANE
            k = first + lane
            x = tl.load(x_rows + k[None, :], mask=in_m[:, None] & (k[None, :] < K), other=0.0)
            if GROUPED:
                group = tl.minimum(first // GROUP_SIZE, groups - 1)  # beyond K, x is 0
                if factor_ptr is None:
                    zero = tl.load(zero_ptr + n * groups + group, mask=in_n, other=0).to(tl.int32)
            w = lane_of(packed, i, BITS).to(tl.int32)
            if factor_ptr is not None:
                multiplier, shift = factor_of(factor_ptr, group, n, in_n, N)
                w = w * multiplier[None, :] + shift[None, :]
            else:
                w = w - zero[None, :]
            if SCALED:
                scale = tl.load(scale_ptr + n * groups + group, mask=in_n, other=0.0).to(tl.float32)
                value += tl.dot(x, w.to(x.dtype), input_precision=PRECISION) * scale[None, :]
            else:
                value = tl.dot(x, w.to(x.dtype), value, input_precision=PRECISION)
    if not SCALED:
        value *= tl.load(scale_ptr + n, mask=in_n, other=0.0).to(tl.float32)[None, :]
    mask = in_m[:, None] & in_n[None, :]
    if SPLITS > 1:
        part = partial_ptr + split.to(tl.int64) * M * N
        tl.store(part + m[:, None] * N + n[None, :], value, mask=mask)
    else:
        column = n
        if channel_ptr is not None:
            column = tl.load(channel_ptr + n, mask=in_n, other=0)
        finish_tile(
            value, m, column, mask, bias_ptr, residual_ptr, down_ptr, up_ptr, out_ptr,
            stride_residual, stride_out, RANK, BLOCK_R,
        )  # fmt: skip


@triton.jit
def sum_splits_kernel(
    partial_ptr,
    channel_ptr,
    bias_ptr,
    residual_ptr,
    down_ptr,
    up_ptr,
    out_ptr,
    M,
    N,
    stride_residual,
    stride_out,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Add the pieces of a split K in a fixed order, so that results do not change from run to run, and finish."""
    m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_m, in_n = m < M, n < N
    mask = in_m[:, None] & in_n[None, :]
    value = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for split in range(SPLITS):
        part = partial_ptr + tl.cast(split, tl.int64) * M * N
        value += tl.load(part + m[:, None] * N + n[None, :], mask=mask, other=0.0)
    column = n
    if channel_ptr is not None:
        column = tl.load(channel_ptr + n, mask=in_n, other=0)
    finish_tile(
        value, m, column, mask, bias_ptr, residual_ptr, down_ptr, up_ptr, out_ptr,
        stride_residual, stride_out, RANK, BLOCK_R,
    )  # fmt: skip


def launch_linear_int(
    x: QuantizedActivation,
    weights: Sequence[PackedWeight],
    rows: EpilogueRows,
    n: int,
    dtype: torch.dtype,
    tile: Tile | None = None,
) -> Tensor:
    """Run `linear_int_kernel`, or once for all widths `linear_widths_kernel`; `x.codes` is (M, K). Only
    `kernels._triton.hopper` has gates; behind the others they are operations of PyTorch.

    `tile` is for one weight of 8 bits, or of 4; by default it is the one in the device's table.
    """
    m, columns = x.codes.shape
    out = torch.empty(m, n, dtype=dtype, device=x.codes.device)
    if out.numel() == 0:
        return out
    arch = architecture(out.device)
    tile = tile or tuned_tile(out.device, operator_of(weights[0].layout, conv=False), Shape(m, n, columns))
    if tile is not None and tile.kernel == HOPPER:
        from kernels._triton import hopper_launch as hopper

        if hopper.takes_weights(weights, tile) and hopper.takes(x.codes, weights[0].codes, rows, n, dtype):
            hopper.linear_int8(x, weights[0], rows, out, tile)
            return out
    if rows.gate is not None:
        return add_gated(launch_linear_int(x, weights, without_gate(rows), n, dtype, tile), rows, dtype)
    if takes_widths(weights, arch):
        launch_linear_widths(x, weights, rows, out)
        return out
    for weight in weights:
        layout = weight.layout
        heavy = rows.rank > 0 or weight.channel is not None
        blocks = int_blocks(arch, m, weight.rows, layout, heavy=heavy, tile=tile)
        lane = blocks.k if layout.bits == 8 else layout.lane
        grid = (triton.cdiv(m, blocks.m) * triton.cdiv(weight.rows, blocks.n),)
        linear_int_kernel[grid](
            x.codes, x.scale, x.zero_point, weight.codes, weight.scale.contiguous(), weight.zero_point,
            weight.factor, weight.total, weight.channel, rows.bias, rows.residual, rows.down, rows.up, out,
            m, weight.rows, columns, triton.cdiv(columns, lane * layout.per_byte), layout.groups, m // len(x.scale),
            x.codes.stride(0), weight.codes.shape[1], stride_of(rows.residual), n,
            BITS=layout.bits, LANE=lane, GROUP_SIZE=layout.group_size, SYMMETRIC=layout.symmetric,
            X_SYMMETRIC=x.symmetric, RANK=rows.rank, BLOCK_M=blocks.m, BLOCK_N=blocks.n,
            BLOCK_R=rank_block(rows.rank), SWIZZLE=blocks.swizzle, num_warps=blocks.warps, num_stages=blocks.stages,
            enable_fp_fusion=False,
        )  # fmt: skip
    return out


def launch_linear_float(
    x: Tensor, weights: Sequence[PackedWeight], rows: EpilogueRows, n: int, dtype: torch.dtype
) -> Tensor:
    """Run `linear_float_kernel` once for each part of the output channels, with K split where tiles are few."""
    m, columns = x.shape
    out = torch.empty(m, n, dtype=dtype, device=x.device)
    if out.numel() == 0:
        return out
    if rows.gate is not None:
        return add_gated(launch_linear_float(x, weights, without_gate(rows), n, dtype), rows, dtype)
    arch = architecture(out.device)
    for weight in weights:
        layout = weight.layout
        heavy = rows.rank > 0 or weight.channel is not None
        blocks = float_blocks(arch, m, weight.rows, grouped=is_grouped(arch, layout), dtype=x.dtype, heavy=heavy)
        lane = blocks.k if layout.bits == 8 and layout.group_size % blocks.k == 0 else layout.lane
        steps = triton.cdiv(columns, lane * layout.per_byte)
        tiles = triton.cdiv(m, blocks.m) * triton.cdiv(weight.rows, blocks.n)
        splits = splits_of_k(arch, tiles, steps)
        partial = None
        if splits > 1:
            partial = torch.empty(splits, m, weight.rows, dtype=torch.float32, device=x.device)
        linear_float_kernel[(tiles, splits)](
            x, weight.codes, weight.scale, weight.zero_point, weight.factor,
            weight.channel, rows.bias, rows.residual, rows.down, rows.up, out, partial,
            m, weight.rows, columns, steps, layout.groups,
            x.stride(0), weight.codes.shape[1], stride_of(rows.residual), n,
            BITS=layout.bits, LANE=lane, GROUP_SIZE=layout.group_size, RANK=rows.rank, BLOCK_M=blocks.m,
            BLOCK_N=blocks.n, BLOCK_R=rank_block(rows.rank), SPLITS=splits, SWIZZLE=blocks.swizzle,
            PRECISION=float_precision(arch, x.dtype), num_warps=blocks.warps, num_stages=blocks.stages,
            enable_fp_fusion=False,
        )  # fmt: skip
        if partial is not None:
            sum_splits_kernel[(triton.cdiv(m, 16), triton.cdiv(weight.rows, 64))](
                partial, weight.channel, rows.bias, rows.residual, rows.down, rows.up, out,
                m, weight.rows, stride_of(rows.residual), n,
                RANK=rows.rank, BLOCK_M=16, BLOCK_N=64, BLOCK_R=rank_block(rows.rank), SPLITS=splits, num_warps=4,
                enable_fp_fusion=False,
            )  # fmt: skip
    return out


def stride_of(residual: Tensor | None) -> int:
    """Elements between the rows of a residual."""
    return 0 if residual is None else residual.stride(0)


def gate_strides(rows: EpilogueRows, m: int) -> tuple[int, int]:
    """Rows of a gate's run, and elements between the gate's rows."""
    return (1, 0) if rows.gate is None else (m // len(rows.gate), rows.gate.stride(0))
