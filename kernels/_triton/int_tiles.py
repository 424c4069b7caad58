"""One tile of an integer product or convolution on packed weights: what `gemm`, `conv` and `widths` give programs."""

from __future__ import annotations

import triton
import triton.language as tl

from kernels._triton.common import factor_of, finish_tile, lane_of


@triton.jit
def int_tile(
    tile_m,
    tile_n,
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
):
    """One tile of codes times codes, exact in int32 per scale, then scaled in float32."""
    m = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, LANE)
    in_m, in_n = m < M, n < N
    x_rows = (x_ptr + m * stride_x)[:, None]
    w_rows = (w_ptr + n.to(tl.int64) * stride_w)[None, :]
    x_zero = tl.load(x_zero_ptr + m // rows_per_scale, mask=in_m, other=0)
    PER_BYTE: tl.constexpr = 8 // BITS
    GROUPED: tl.constexpr = GROUP_SIZE > 0
    SCALED: tl.constexpr = GROUPED and factor_ptr is None
    BY_LANE: tl.constexpr = SCALED and GROUP_SIZE % (LANE * PER_BYTE) != 0
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    x_sum = tl.zeros((BLOCK_M,), dtype=tl.int32)
    value = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if not GROUPED:
        zero = tl.load(zero_ptr + n, mask=in_n, other=0)
    for block in range(blocks):
        byte = block * LANE + lane
        packed = tl.load(w_rows + byte[:, None], mask=in_n[None, :] & (byte[:, None] < stride_w), other=0)
        for i in tl.static_range(PER_BYTE):
            first = (block * PER_BYTE + i) * LANE
            k = first + lane
            x = tl.load(x_rows + k[None, :], mask=in_m[:, None] & (k[None, :] < K), other=0)
            w = lane_of(packed, i, BITS)
            if GROUPED:
                group = tl.minimum(first // GROUP_SIZE, groups - 1)  # beyond K, x is 0
                if factor_ptr is None:
                    zero = tl.load(zero_ptr + n * groups + group, mask=in_n, other=0)
            if factor_ptr is not None:
                multiplier, shift = factor_of(factor_ptr, group, n, in_n, N)
                w = w * multiplier.to(tl.int8)[None, :] + shift.to(tl.int8)[None, :]
            elif BITS < 8:
                w = w - zero[None, :]
            elif not SYMMETRIC:
                x_sum += tl.sum(x.to(tl.int32), axis=1)
            acc = tl.dot(x, w, acc, out_dtype=tl.int32)
            if SCALED and (BY_LANE or i == PER_BYTE - 1):
                # The sum of a group may come in several pieces; its zero-point correction belongs to the first.
                start = (block * PER_BYTE if not BY_LANE else block * PER_BYTE + i) * LANE
                if not X_SYMMETRIC:
                    opens = tl.where((start % GROUP_SIZE == 0) & (start < K), 1, 0)
                    total = tl.load(total_ptr + n * groups + group, mask=in_n, other=0).to(tl.int32) * opens
                    acc -= x_zero[:, None] * total[None, :]
                if BITS == 8 and not SYMMETRIC:
                    acc -= x_sum[:, None] * zero.to(tl.int32)[None, :]
                    x_sum = tl.zeros((BLOCK_M,), dtype=tl.int32)
                scale = tl.load(scale_ptr + n * groups + group, mask=in_n, other=0.0).to(tl.float32)
                value += acc.to(tl.float32) * scale[None, :]
                acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    x_scale = tl.load(x_scale_ptr + m // rows_per_scale, mask=in_m, other=0.0)
    if SCALED:
        value = value * x_scale[:, None]
    else:
        if BITS == 8 and not SYMMETRIC:
            acc -= x_sum[:, None] * zero.to(tl.int32)[None, :]
        if not X_SYMMETRIC:
            acc -= x_zero[:, None] * tl.load(total_ptr + n, mask=in_n, other=0).to(tl.int32)[None, :]
        scale = tl.load(scale_ptr + n, mask=in_n, other=0.0).to(tl.float32)
        value = acc.to(tl.float32) * scale[None, :] * x_scale[:, None]
    column = n
    if channel_ptr is not None:
        column = tl.load(channel_ptr + n, mask=in_n, other=0)
    mask = in_m[:, None] & in_n[None, :]
    finish_tile(
        value, m, column, mask, bias_ptr, residual_ptr, down_ptr, up_ptr, out_ptr,
        stride_residual, stride_out, RANK, BLOCK_R,
    )  # fmt: skip


@triton.jit
def conv_tile(
    tile_m,
    tile_n,
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
):
    """One tile of (pixels, output channels).

    Padding is 0.0, whose code is the zero point. It is read as code 0 and left out of the zero point's correction,
    which is the same integer and keeps the loaded tile as it is.
    """
    m = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, LANE)
    in_m, in_n = m < M, n < N
    pixel = (m % (OH * OW)).to(tl.int32)  # one image has fewer than 2**31 codes, a batch may have more
    top = pixel // OW * STRIDE_H - PAD_H
    left = pixel % OW * STRIDE_W - PAD_W
    x_image = x_ptr + m // (OW * OH) * stride_b
    w_rows = (w_ptr + n.to(tl.int64) * (TAPS_H * TAPS_W * tap_bytes))[None, :]
    x_zero = tl.load(x_zero_ptr + m // rows_per_scale, mask=in_m, other=0)
    PER_BYTE: tl.constexpr = 8 // BITS
    GROUPED: tl.constexpr = GROUP_SIZE > 0
    SCALED: tl.constexpr = GROUPED and factor_ptr is None
    BY_LANE: tl.constexpr = SCALED and GROUP_SIZE % (LANE * PER_BYTE) != 0
    PADDED: tl.constexpr = PAD_H > 0 or PAD_W > 0
    groups = TAPS_H * TAPS_W * groups_per_tap
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    x_sum = tl.zeros((BLOCK_M,), dtype=tl.int32)
    value = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if not GROUPED:
        zero = tl.load(zero_ptr + n, mask=in_n, other=0)
    for step in range(TAPS_H * TAPS_W * blocks):
        tap = step // blocks
        block = step % blocks
        row = top + tap // TAPS_W * DILATION_H
        col = left + tap % TAPS_W * DILATION_W
        inside = in_m
        if PADDED:
            inside = in_m & (row >= 0) & (row < H) & (col >= 0) & (col < W)
        x_pixels = (x_image + row * stride_h + col * stride_w_in)[:, None]
        byte = block * LANE + lane
        packed = tl.load(
            w_rows + (tap * tap_bytes + byte)[:, None], mask=in_n[None, :] & (byte[:, None] < tap_bytes), other=0
        )
        for i in tl.static_range(PER_BYTE):
            first = (block * PER_BYTE + i) * LANE
            c = first + lane
            in_c = c < C
            x = tl.load(x_pixels + c[None, :], mask=inside[:, None] & in_c[None, :], other=0)
            w = lane_of(packed, i, BITS)
            if GROUPED:
                # Beyond C, x is 0, whatever group is read.
                group = tap * groups_per_tap + tl.minimum(first // GROUP_SIZE, groups_per_tap - 1)
                if factor_ptr is None:
                    zero = tl.load(zero_ptr + n * groups + group, mask=in_n, other=0)
            if factor_ptr is not None:
                multiplier, shift = factor_of(factor_ptr, group, n, in_n, N)
                w = w * multiplier.to(tl.int8)[None, :] + shift.to(tl.int8)[None, :]
            elif BITS < 8:
                w = w - zero[None, :]
            elif not SYMMETRIC:
                x_sum += tl.sum(x.to(tl.int32), axis=1)
            acc = tl.dot(x, w, acc, out_dtype=tl.int32)
            if SCALED and (BY_LANE or i == PER_BYTE - 1):
                start = (block * PER_BYTE if not BY_LANE else block * PER_BYTE + i) * LANE
                if not X_SYMMETRIC:
                    opens = tl.where((start % GROUP_SIZE == 0) & (start < C), 1, 0)
                    total = tl.load(total_ptr + n * groups + group, mask=in_n, other=0).to(tl.int32) * opens
                    acc -= tl.where(inside, x_zero, 0)[:, None] * total[None, :]
                if BITS == 8 and not SYMMETRIC:
                    acc -= x_sum[:, None] * zero.to(tl.int32)[None, :]
                    x_sum = tl.zeros((BLOCK_M,), dtype=tl.int32)
                scale = tl.load(scale_ptr + n * groups + group, mask=in_n, other=0.0).to(tl.float32)
                value += acc.to(tl.float32) * scale[None, :]
                acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    x_scale = tl.load(x_scale_ptr + m // rows_per_scale, mask=in_m, other=0.0)
    if SCALED:
        value = value * x_scale[:, None]
    else:
        if BITS == 8 and not SYMMETRIC:
            acc -= x_sum[:, None] * zero.to(tl.int32)[None, :]
        if not X_SYMMETRIC:
            whole = tl.zeros((BLOCK_N,), dtype=tl.int32)
            for tap in range(TAPS_H * TAPS_W):
                total = tl.load(total_ptr + n * (TAPS_H * TAPS_W) + tap, mask=in_n, other=0)
                whole += total
                if PADDED:
                    row = top + tap // TAPS_W * DILATION_H
                    col = left + tap % TAPS_W * DILATION_W
                    outside = in_m & ((row < 0) | (row >= H) | (col < 0) | (col >= W))
                    if tl.max(outside.to(tl.int32), axis=0) > 0:
                        acc += tl.where(outside, x_zero, 0)[:, None] * total[None, :]
            acc -= x_zero[:, None] * whole[None, :]
        scale = tl.load(scale_ptr + n, mask=in_n, other=0.0).to(tl.float32)
        value = acc.to(tl.float32) * scale[None, :] * x_scale[:, None]
    column = n
    if channel_ptr is not None:
        column = tl.load(channel_ptr + n, mask=in_n, other=0)
    mask = in_m[:, None] & in_n[None, :]
    finish_tile(
        value, m, column, mask, bias_ptr, residual_ptr, down_ptr, up_ptr, out_ptr,
        stride_residual, stride_out, RANK, BLOCK_R,
    )  # fmt: skip
