"""The main loop of 8-bit matrix products and convolutions on Hopper (sm_90), written in Gluon.

Triton's own pipeline waits for every integer wgmma before it goes on: it keeps a product in flight only if its sum is
float32 ("Rule 2.1" of its WGMMAPipeline). So the loop of integers is written out here: operands are copied by TMA
into STAGES buffers, one product is always in flight while the next one's operands arrive, and tiles follow one another
in a persistent grid, so that the first operands of a tile arrive during the epilogue of the one before. Sums are those
of `kernels._triton.gemm` and `kernels._triton.conv`, bit for bit.

A convolution (stride 1, dilation 1) is the same loop: a tile of rows is a rectangle of pixels of one image, which TMA
reads shifted by each tap, with zeros beyond the image.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# Gluon renamed them after triton 3.6.
load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store_tile = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@gluon.jit
def tile_of(tile, tiles_m, tiles_n, SWIZZLE: gl.constexpr):
    """Rows and columns of a tile, as `kernels._triton.common.tile_of`."""
    width = SWIZZLE * tiles_n
    first = (tile // width) * SWIZZLE
    height = gl.minimum(tiles_m - first, SWIZZLE)
    return first + (tile % width) % height, (tile % width) // height


@gluon.jit
def issue(
    count, tile, tap, c, m, n, top, left, grid, x_desc, w_desc, tail_desc, buffers,
    TAPS_H: gl.constexpr, TAPS_W: gl.constexpr, PAD_H: gl.constexpr, PAD_W: gl.constexpr,
    SWIZZLE: gl.constexpr, STAGES: gl.constexpr, TAIL_N: gl.constexpr,
):  # fmt: skip
    """Start copying the operands of one step into their buffers; return the next step.

    `m` is the first row of the tile, or its image, and `top` and `left` the first pixel of the image; `n` the first
    column.
    """
    CONV: gl.constexpr = len(x_desc.block_type.shape) == 4
    tiles_m, tiles_n, c_tiles, tiles_h, tiles_w, tap_bytes = grid
    bars, x_bufs, w_bufs, tail_bufs = buffers
    if (tap == 0) & (c == 0):
        tile_m, tile_n = tile_of(tile, tiles_m, tiles_n, SWIZZLE)
        n = tile_n * (w_desc.block_type.shape[0] + TAIL_N)
        if CONV:
            m = tile_m // (tiles_h * tiles_w)
            top = tile_m % (tiles_h * tiles_w) // tiles_w * x_desc.block_type.shape[1] - PAD_H
            left = tile_m % tiles_w * x_desc.block_type.shape[2] - PAD_W
        else:
            m = tile_m * x_desc.block_type.shape[0]
    live = tile < tiles_m * tiles_n
    slot = count % STAGES
    bar = bars.index(slot)
    first = c * w_desc.block_type.shape[1]
    TAIL_BYTES: gl.constexpr = TAIL_N * w_desc.block_type.shape[1]
    mbarrier.expect(bar, x_desc.block_type.nbytes + w_desc.block_type.nbytes + TAIL_BYTES, pred=live)
    if CONV:
        load_tile(x_desc, [m, top + tap // TAPS_W, left + tap % TAPS_W, first], bar, x_bufs.index(slot), live)
    else:
        load_tile(x_desc, [m, first], bar, x_bufs.index(slot), live)
    load_tile(w_desc, [n, tap * tap_bytes + first], bar, w_bufs.index(slot), live)
    if TAIL_N > 0:
        after = n + w_desc.block_type.shape[0]
        load_tile(tail_desc, [after, tap * tap_bytes + first], bar, tail_bufs.index(slot), live)
    c += 1
    if c == c_tiles:
        c = 0
        tap += 1
        if tap == TAPS_H * TAPS_W:
            tap = 0
            tile += gl.num_programs(0)
    return tile, tap, c, m, n, top, left


# One compilation for all sizes: these integers are never known to be 1, or multiples of 16.
@gluon.jit(
    do_not_specialize=["M", "tiles_m", "tiles_h", "tiles_w", "H", "W", "rows_per_scale", "rows_per_gate", "tap_groups"]
)
def product_kernel(
    x_desc,  # (M, K), or (B, H, W, C) of a convolution: int8 or float8e4nv
    w_desc,  # (N, taps * tap_bytes)
    out_desc,  # (M, N), or (B, H, W, N)
    tail_desc,  # the same weight and output in blocks of TAIL_N columns, or None
    out_tail_desc,
    x_scale_ptr,  # (R,) float32
    x_zero_ptr,  # (R,) int32 or None
    x_sum_ptr,  # (M,) int32 or None: sums of the codes of each row, where weights have zero points
    scale_ptr,  # (N,) float32, or (taps * tap_groups, N)
    zero_ptr,  # (N,) int8
    total_ptr,  # (N, taps) int32, or float32 of groups: sums of scale times integer
    bias_ptr,  # (N,) or None
    gate_ptr,  # (runs of rows_per_gate rows, N) or None
    residual_ptr,  # (M, N) or None
    M,
    N,
    C,
    tiles_m,
    tiles_h,
    tiles_w,
    H,
    W,
    tap_bytes,
    tap_groups,
    rows_per_scale,
    rows_per_gate,
    stride_gate,
    stride_residual,
    SUM: gl.constexpr,
    LAYOUT: gl.constexpr,
    GROUP_STEPS: gl.constexpr,
    TAPS_H: gl.constexpr,
    TAPS_W: gl.constexpr,
    PAD_H: gl.constexpr,
    PAD_W: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    HALVES: gl.constexpr,
    SWIZZLE: gl.constexpr,
    STAGES: gl.constexpr,
    TAIL_N: gl.constexpr,
    TAIL_LAYOUT: gl.constexpr,
):
    """Tiles of codes times codes, summed in SUM and scaled in float32; each program takes every nth tile.

    Tensors have powers of two of columns, and the layers of SDXL multiples of 160 and 320: so a tile may have a tail of
    TAIL_N columns beside its BLOCK_N, multiplied with the same rows.

    With GROUP_STEPS, that many steps of BLOCK_K columns share a scale: their sum ends with the last of them, is scaled
    and added in float32. Nothing is in flight meanwhile in this program; others on the same multiprocessor multiply.
    """
    CONV: gl.constexpr = len(x_desc.block_type.shape) == 4
    TAPS: gl.constexpr = TAPS_H * TAPS_W
    x_bufs = gl.allocate_shared_memory(x_desc.dtype, [STAGES] + x_desc.block_type.shape, x_desc.layout)  # noqa: RUF005
    w_bufs = gl.allocate_shared_memory(w_desc.dtype, [STAGES] + w_desc.block_type.shape, w_desc.layout)  # noqa: RUF005
    out_buf = gl.allocate_shared_memory(out_desc.dtype, out_desc.block_type.shape, out_desc.layout)
    tail_bufs, out_tail_buf = w_bufs, out_buf
    if TAIL_N > 0:
        gl.static_assert(GROUP_STEPS == 0, "no tails with groups")
        shape: gl.constexpr = [STAGES] + tail_desc.block_type.shape  # noqa: RUF005
        tail_bufs = gl.allocate_shared_memory(w_desc.dtype, shape, tail_desc.layout)
        out_tail_buf = gl.allocate_shared_memory(out_desc.dtype, out_tail_desc.block_type.shape, out_tail_desc.layout)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(bars.index(i), count=1)
    tiles_n = gl.cdiv(N, BLOCK_N + TAIL_N)
    c_tiles = gl.cdiv(C, BLOCK_K)
    grid = (tiles_m, tiles_n, c_tiles, tiles_h, tiles_w, tap_bytes)
    buffers = (bars, x_bufs, w_bufs, tail_bufs)
    next_tile, next_tap, next_c = gl.program_id(0), 0, 0
    next_m, next_n, next_top, next_left = 0, 0, 0, 0
    for i in gl.static_range(STAGES - 1):
        next_tile, next_tap, next_c, next_m, next_n, next_top, next_left = issue(
            i, next_tile, next_tap, next_c, next_m, next_n, next_top, next_left, grid, x_desc, w_desc, tail_desc,
            buffers, TAPS_H, TAPS_W, PAD_H, PAD_W, SWIZZLE, STAGES, TAIL_N,
        )  # fmt: skip
    count = 0
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        tile_m, tile_n = tile_of(tile, tiles_m, tiles_n, SWIZZLE)
        first = tile_n * (BLOCK_N + TAIL_N)
        n = first + gl.arange(0, BLOCK_N, gl.SliceLayout(0, LAYOUT))
        in_n = n < N
        acc = gl.zeros((BLOCK_M, BLOCK_N), dtype=SUM, layout=LAYOUT)
        if TAIL_N > 0:
            tail = gl.zeros((BLOCK_M, TAIL_N), dtype=SUM, layout=TAIL_LAYOUT)
        if GROUP_STEPS > 0:
            value = gl.zeros((BLOCK_M, BLOCK_N), dtype=gl.float32, layout=LAYOUT)
            tap, c = 0, 0
        for _ in range(TAPS * c_tiles):
            slot = count % STAGES
            if GROUP_STEPS > 0:
                at = (tap * tap_groups + c // GROUP_STEPS) * N + n
                scale = gl.load(scale_ptr + at, mask=in_n, other=0.0)
            mbarrier.wait(bars.index(slot), count // STAGES & 1)
            x = x_bufs.index(slot)
            if CONV:
                x = x.reshape((BLOCK_M, BLOCK_K))
            w = w_bufs.index(slot).permute((1, 0))
            if GROUP_STEPS > 0:
                acc = warpgroup_mma(x, w, acc, use_acc=c % GROUP_STEPS != 0, is_async=True)
                acc = warpgroup_mma_wait(0, (acc,))
            elif TAIL_N > 0:
                acc = warpgroup_mma(x, w, acc, is_async=True)
                tail = warpgroup_mma(x, tail_bufs.index(slot).permute((1, 0)), tail, is_async=True)
                acc, tail = warpgroup_mma_wait(2, (acc, tail))
            else:
                acc = warpgroup_mma(x, w, acc, is_async=True)
                # One product stays in flight; the one before has ended, and its buffers are free.
                acc = warpgroup_mma_wait(1, (acc,))
            next_tile, next_tap, next_c, next_m, next_n, next_top, next_left = issue(
                count + STAGES - 1, next_tile, next_tap, next_c, next_m, next_n, next_top, next_left, grid,
                x_desc, w_desc, tail_desc, buffers, TAPS_H, TAPS_W, PAD_H, PAD_W, SWIZZLE, STAGES, TAIL_N,
            )  # fmt: skip
            if GROUP_STEPS > 0:
                if (c % GROUP_STEPS == GROUP_STEPS - 1) | (c == c_tiles - 1):
                    value = gl.fma(acc.to(gl.float32), broadcast(scale, value), value)
                c += 1
                if c == c_tiles:
                    c = 0
                    tap += 1
            count += 1
        place = (tile_m, M, N, H, W, tiles_h, tiles_w)
        added = (bias_ptr, gate_ptr, residual_ptr, rows_per_gate, stride_gate, stride_residual)
        scales = (x_scale_ptr, x_zero_ptr, x_sum_ptr, scale_ptr, zero_ptr, total_ptr, rows_per_scale)
        if GROUP_STEPS > 0:
            acc = warpgroup_mma_wait(0, (acc,))
            finish(
                acc, value, first, place, scales, added, x_desc, out_desc, out_buf, LAYOUT, GROUP_STEPS, TAPS_H, TAPS_W,
                PAD_H, PAD_W, BLOCK_M, BLOCK_N, HALVES,
            )  # fmt: skip
        else:
            if TAIL_N > 0:
                acc, tail = warpgroup_mma_wait(0, (acc, tail))
                # The tail first, so that its registers are free for the rest.
                finish(
                    tail, tail, first + BLOCK_N, place, scales, added, x_desc, out_tail_desc, out_tail_buf, TAIL_LAYOUT,
                    0, TAPS_H, TAPS_W, PAD_H, PAD_W, BLOCK_M, TAIL_N, 1,
                )  # fmt: skip
            else:
                acc = warpgroup_mma_wait(0, (acc,))
            finish(
                acc, acc, first, place, scales, added, x_desc, out_desc, out_buf, LAYOUT, 0, TAPS_H, TAPS_W, PAD_H,
                PAD_W, BLOCK_M, BLOCK_N, HALVES,
            )  # fmt: skip
    tma.store_wait(0)


@gluon.jit
def finish(
    acc, value, first, place, scales, added, x_desc, out_desc, out_buf, LAYOUT: gl.constexpr, GROUP_STEPS: gl.constexpr,
    TAPS_H: gl.constexpr, TAPS_W: gl.constexpr, PAD_H: gl.constexpr, PAD_W: gl.constexpr, BLOCK_M: gl.constexpr,
    WIDTH: gl.constexpr, HALVES: gl.constexpr,
):  # fmt: skip
    """Correct, scale, add to and write the sums `acc`, or with groups the scaled `value`, of WIDTH columns from `first`
    on."""  # fmt: skip
    CONV: gl.constexpr = len(x_desc.block_type.shape) == 4
    TAPS: gl.constexpr = TAPS_H * TAPS_W
    tile_m, M, N, H, W, tiles_h, tiles_w = place
    bias_ptr, gate_ptr, residual_ptr, rows_per_gate, stride_gate, stride_residual = added
    x_scale_ptr, x_zero_ptr, x_sum_ptr, scale_ptr, zero_ptr, total_ptr, rows_per_scale = scales
    n = first + gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT))
    in_n = n < N
    row = gl.arange(0, BLOCK_M, gl.SliceLayout(1, LAYOUT))
    image, top, left = 0, 0, 0
    y, x_at = row, row
    if CONV:
        BLOCK_W: gl.constexpr = x_desc.block_type.shape[2]
        image = tile_m // (tiles_h * tiles_w)
        top = tile_m % (tiles_h * tiles_w) // tiles_w * x_desc.block_type.shape[1]
        left = tile_m % tiles_w * BLOCK_W
        y = top + row // BLOCK_W
        x_at = left + row % BLOCK_W
        m = (image * H + y) * W + x_at
        in_m = (y < H) & (x_at < W)
    else:
        m = tile_m * BLOCK_M + row
        in_m = m < M
    if GROUP_STEPS > 0:
        if x_zero_ptr is not None:
            x_zero = gl.load(x_zero_ptr + m // rows_per_scale, mask=in_m, other=0)
            whole = gl.zeros((WIDTH,), dtype=gl.float32, layout=gl.SliceLayout(0, LAYOUT))
            for tap in range(TAPS):
                part = gl.load(total_ptr + n * TAPS + tap, mask=in_n, other=0.0)
                whole += part
                if PAD_H > 0 or PAD_W > 0:
                    outside = is_outside(y, x_at, tap, H, W, TAPS_W, PAD_H, PAD_W) & in_m
                    if gl.max(outside.to(gl.int32), axis=0) > 0:
                        value += gl.where(outside, x_zero, 0).to(gl.float32)[:, None] * part[None, :]
            value -= x_zero.to(gl.float32)[:, None] * whole[None, :]
    else:
        if x_zero_ptr is not None:
            x_zero = gl.load(x_zero_ptr + m // rows_per_scale, mask=in_m, other=0)
            sums = gl.zeros((WIDTH,), dtype=gl.int32, layout=gl.SliceLayout(0, LAYOUT))
            for tap in range(TAPS):
                sums += gl.load(total_ptr + n * TAPS + tap, mask=in_n, other=0).to(gl.int32)
            acc -= x_zero[:, None] * sums[None, :]
            if PAD_H > 0 or PAD_W > 0:
                # A tap that falls on padding has no part in the correction.
                for tap in range(TAPS):
                    outside = is_outside(y, x_at, tap, H, W, TAPS_W, PAD_H, PAD_W) & in_m
                    if gl.max(outside.to(gl.int32), axis=0) > 0:
                        total = gl.load(total_ptr + n * TAPS + tap, mask=in_n, other=0).to(gl.int32)
                        acc += gl.where(outside, x_zero, 0)[:, None] * total[None, :]
        if x_sum_ptr is not None:
            x_sum = gl.load(x_sum_ptr + m, mask=in_m, other=0)
            acc -= x_sum[:, None] * gl.load(zero_ptr + n, mask=in_n, other=0).to(gl.int32)[None, :]
        value = acc.to(gl.float32) * gl.load(scale_ptr + n, mask=in_n, other=0.0).to(gl.float32)[None, :]
    value = value * gl.load(x_scale_ptr + m // rows_per_scale, mask=in_m, other=0.0)[:, None]
    if bias_ptr is not None:
        value += gl.load(bias_ptr + n, mask=in_n, other=0.0).to(gl.float32)[None, :]
    if gate_ptr is not None:
        at = gate_ptr + (m // rows_per_gate).to(gl.int64)[:, None] * stride_gate + n[None, :]
        value = value * gl.load(at, mask=in_m[:, None] & in_n[None, :], other=0.0).to(gl.float32)
    if residual_ptr is not None:
        at = residual_ptr + m.to(gl.int64)[:, None] * stride_residual + n[None, :]
        value += gl.load(at, mask=in_m[:, None] & in_n[None, :], other=0.0).to(gl.float32)
    narrow = value.to(out_desc.dtype)
    if HALVES == 2:
        left_half, right_half = narrow.reshape((BLOCK_M, 2, WIDTH // 2)).permute((0, 2, 1)).split()
        put(left_half, out_buf, out_desc, image, top, left, tile_m * BLOCK_M, first, BLOCK_M, CONV)
        put(
            right_half, out_buf, out_desc, image, top, left, tile_m * BLOCK_M, first + WIDTH // 2,
            BLOCK_M, CONV,
        )  # fmt: skip
    else:
        put(narrow, out_buf, out_desc, image, top, left, tile_m * BLOCK_M, first, BLOCK_M, CONV)


@gluon.jit
def broadcast(columns, like):
    """Repeat a row of columns for every row of a tile."""
    return columns[None, :] + gl.zeros_like(like)


@gluon.jit
def is_outside(y, x, tap, H, W, TAPS_W: gl.constexpr, PAD_H: gl.constexpr, PAD_W: gl.constexpr):
    """Whether a tap of these pixels falls on padding."""
    row = y + (tap // TAPS_W - PAD_H)
    col = x + (tap % TAPS_W - PAD_W)
    return (row < 0) | (row >= H) | (col < 0) | (col >= W)


@gluon.jit
def put(value, buf, desc, image, top, left, m, n, BLOCK_M: gl.constexpr, CONV: gl.constexpr):
    """Write a tile through shared memory; the copy to global memory goes on while the next tile is computed."""
    tma.store_wait(0)
    if CONV:
        buf.reshape((BLOCK_M, desc.block_type.shape[3])).store(value)
        fence_async_shared()
        store_tile(desc, [image, top, left, n], buf)
    else:
        buf.store(value)
        fence_async_shared()
        store_tile(desc, [m, n], buf)
