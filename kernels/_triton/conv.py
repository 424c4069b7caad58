"""Triton twin of `kernels.conv`: convolution as a GEMM whose rows are gathered while they are loaded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._triton.blocks import architecture, int_blocks, rank_block
from kernels._triton.common import tile_of
from kernels._triton.gemm import launch_linear_int, stride_of
from kernels._triton.int_tiles import conv_tile
from kernels._triton.tuned import HOPPER, Shape, Tile, operator_of, tuned_tile
from kernels._triton.widths import launch_conv2d_widths, takes_widths
from kernels.activations import QuantizedActivation
from kernels.conv import ConvGeometry
from kernels.epilogue import EpilogueRows
from kernels.weights import PackedWeight

# A convolution that is a product of pixels.
POINTWISE = ConvGeometry((1, 1))


@triton.jit
def conv2d_int_kernel(
    x_ptr,  # (B, H, W, C) int8 codes
    x_scale_ptr,  # (R,) float32, R is 1 or B
    x_zero_ptr,  # (R,) int32
    w_ptr,  # (N, taps * blocks * LANE) packed codes
    scale_ptr,  # (N, G), or (N, 1) where groups have multipliers
    zero_ptr,  # (N, G) int8, without multipliers
    factor_ptr,  # (G, N) int16 or None
    total_ptr,  # (N, taps * scales of a tap)
    channel_ptr,  # (N,) int32 or None
    bias_ptr,
    residual_ptr,
    down_ptr,
    up_ptr,
    out_ptr,  # (B, OH, OW, N)
    M,
    N,
    C,
    H,
    W,
    OH,
    OW,
    blocks,
    groups_per_tap,
    rows_per_scale,
    stride_b,
    stride_h,
    stride_w_in,
    tap_bytes,
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
    """Tiles of `conv_tile` for all rows of a weight."""
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), SWIZZLE)
    conv_tile(
        tile_m, tile_n, x_ptr, x_scale_ptr, x_zero_ptr, w_ptr, scale_ptr, zero_ptr, factor_ptr, total_ptr,
        channel_ptr, bias_ptr, residual_ptr, down_ptr, up_ptr, out_ptr, M, N, C, H, W, OH, OW, blocks, groups_per_tap,
        rows_per_scale, stride_b, stride_h, stride_w_in, tap_bytes, stride_residual, stride_out, TAPS_H, TAPS_W,
        STRIDE_H, STRIDE_W, PAD_H, PAD_W, DILATION_H, DILATION_W, BITS, LANE, GROUP_SIZE, SYMMETRIC, X_SYMMETRIC, RANK,
        BLOCK_M, BLOCK_N, BLOCK_R,
    )  # fmt: skip


def launch_conv2d_int(
    x: QuantizedActivation,
    weights: Sequence[PackedWeight],
    geometry: ConvGeometry,
    rows: EpilogueRows,
    n: int,
    dtype: torch.dtype,
    tile: Tile | None = None,
) -> Tensor:
    """Run `conv2d_int_kernel`, or once for all widths `conv2d_widths_kernel`; `tile` as for `launch_linear_int`."""
    batch, height, width, channels = x.codes.shape
    out_h, out_w = geometry.output_size(height, width)
    if geometry == POINTWISE and x.codes.is_contiguous():
        pixels = QuantizedActivation(x.codes.view(-1, channels), x.scale, x.zero_point, x.symmetric)
        return launch_linear_int(pixels, weights, rows, n, dtype, tile).view(batch, height, width, n)
    out = torch.empty(batch, out_h, out_w, n, dtype=dtype, device=x.codes.device)
    m = batch * out_h * out_w
    if out.numel() == 0:
        return out
    arch = architecture(out.device)
    shape = Shape(m, n, channels, geometry.taps)
    tile = tile or tuned_tile(out.device, operator_of(weights[0].layout, conv=True), shape)
    if tile is not None and tile.kernel == HOPPER:
        from kernels._triton import hopper_launch as hopper

        fits = hopper.takes_weights(weights, tile) and hopper.takes_image(x.codes, geometry)
        if fits and hopper.takes(x.codes, weights[0].codes, rows, n, dtype):
            hopper.conv_int8(x, weights[0], geometry, rows, out, tile)
            return out
    if takes_widths(weights, arch):
        launch_conv2d_widths(x, weights, geometry, rows, out)
        return out
    for weight in weights:
        layout = weight.layout
        heavy = rows.rank > 0 or weight.channel is not None
        heavy = heavy or (arch == "sm_80" and not x.symmetric)
        blocks = int_blocks(arch, m, weight.rows, layout, heavy=heavy, tile=tile)
        lane = blocks.k if layout.bits == 8 else layout.lane
        grid = (triton.cdiv(m, blocks.m) * triton.cdiv(weight.rows, blocks.n),)
        conv2d_int_kernel[grid](
            x.codes, x.scale, x.zero_point, weight.codes, weight.scale.contiguous(), weight.zero_point,
            weight.factor, weight.total, weight.channel, rows.bias, rows.residual, rows.down, rows.up, out,
            m, weight.rows, channels, height, width, out_h, out_w, triton.cdiv(channels, lane * layout.per_byte),
            layout.groups_per_tap, m // len(x.scale), x.codes.stride(0), x.codes.stride(1), x.codes.stride(2),
            weight.codes.shape[1] // layout.taps, stride_of(rows.residual), n,
            TAPS_H=geometry.kernel[0], TAPS_W=geometry.kernel[1], STRIDE_H=geometry.stride[0],
            STRIDE_W=geometry.stride[1], PAD_H=geometry.padding[0], PAD_W=geometry.padding[1],
            DILATION_H=geometry.dilation[0], DILATION_W=geometry.dilation[1],
            BITS=layout.bits, LANE=lane, GROUP_SIZE=layout.group_size, SYMMETRIC=layout.symmetric,
            X_SYMMETRIC=x.symmetric, RANK=rows.rank, BLOCK_M=blocks.m, BLOCK_N=blocks.n,
            BLOCK_R=rank_block(rows.rank), SWIZZLE=blocks.swizzle, num_warps=blocks.warps, num_stages=blocks.stages,
            enable_fp_fusion=False,
        )  # fmt: skip
    return out
