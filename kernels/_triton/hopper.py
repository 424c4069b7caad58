"""The main loop of 8-bit matrix products and convolutions on Hopper (sm_90), written in Gluon.

Triton's own pipeline waits for every integer wgmma before it goes on: it keeps a product in flight only if its sum is
float32 ("Rule 2.1" of its WGMMAPipeline). So the loop of integers is written out here: operands are copied by TMA
into STAGES buffers, one product is always in flight while the next one's operands arrive, and tiles follow one another
in a persistent grid, so that the first operands of a tile arrive during the epilogue of the one before. Sums are those
of `kernels._triton.gemm` and `kernels._triton.conv`, bit for bit.

A convolution (stride 1, dilation 1) is the same loop: a tile of rows is a rectangle of pixels of one image, which TMA
reads shifted by each tap, with zeros beyond the image.

Packed weights of 4 bits are multiplied transposed: tensor cores read their first operand from registers, so that a
weight is unpacked to int8 where it was loaded to, and never stored. 32 bytes of a row are two such operands of 32
codes, low bits and high ones, as a block of `kernels.weights` has them; while tensor cores multiply one pair, the next
is unpacked.
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
_SHARED = gl.shared_memory_descriptor
reinterpret = getattr(_SHARED, "reinterpret", None) or _SHARED._reinterpret
# Bytes of a packed row that are unpacked at a time: what one wgmma multiplies.
UNIT = gl.constexpr(32)


@gluon.jit
def tile_of(tile, tiles_m, tiles_n, SWIZZLE: gl.constexpr):
    """Rows and columns of a tile, as `kernels._triton.common.tile_of`; of one beyond the last, some."""
    width = SWIZZLE * tiles_n
    first = (tile // width) * SWIZZLE
    height = gl.maximum(gl.minimum(tiles_m - first, SWIZZLE), 1)
    return first + (tile % width) % height, (tile % width) // height


@gluon.jit
def issue(
    count, tile, tap, c, m, n, top, left, grid, x_desc, w_desc, tail_desc, factor_desc, buffers,
    TAPS_H: gl.constexpr, TAPS_W: gl.constexpr, PAD_H: gl.constexpr, PAD_W: gl.constexpr,
    SWIZZLE: gl.constexpr, STAGES: gl.constexpr, TAIL: gl.constexpr, GROUP_SIZE: gl.constexpr,
):  # fmt: skip
    """Start copying the operands of one step into their buffers; return the next step.

    `m` is the first row of the tile, or its image, and `top` and `left` the first pixel of the image; `n` the first
    column.
    """
    CONV: gl.constexpr = len(x_desc.block_type.shape) == 4
    PACKED: gl.constexpr = w_desc.dtype == gl.uint8
    BLOCK_K: gl.constexpr = x_desc.block_type.shape[len(x_desc.block_type.shape) - 1]
    tiles_m, tiles_n, c_tiles, tiles_h, tiles_w, tap_bytes, tap_groups = grid
    bars, x_bufs, w_bufs, tail_bufs, factor_bufs = buffers
    if (tap == 0) & (c == 0):
        tile_m, tile_n = tile_of(tile, tiles_m, tiles_n, SWIZZLE)
        n = tile_n * (w_desc.block_type.shape[0] + (0 if PACKED else TAIL))
        if CONV:
            m = tile_m // (tiles_h * tiles_w)
            top = tile_m % (tiles_h * tiles_w) // tiles_w * x_desc.block_type.shape[1] - PAD_H
            left = tile_m % tiles_w * x_desc.block_type.shape[2] - PAD_W
        else:
            m = tile_m * (x_desc.block_type.shape[0] + (TAIL if PACKED else 0))
    live = tile < tiles_m * tiles_n
    slot = count % STAGES
    bar = bars.index(slot)
    w_first = tap * tap_bytes + c * w_desc.block_type.shape[1]
    MORE_BYTES: gl.constexpr = TAIL * BLOCK_K + (0 if factor_desc is None else factor_desc.block_type.nbytes)
    mbarrier.expect(bar, x_desc.block_type.nbytes + w_desc.block_type.nbytes + MORE_BYTES, pred=live)
    if CONV:
        load_tile(x_desc, [m, top + tap // TAPS_W, left + tap % TAPS_W, c * BLOCK_K], bar, x_bufs.index(slot), live)
    else:
        load_tile(x_desc, [m, c * BLOCK_K], bar, x_bufs.index(slot), live)
    load_tile(w_desc, [n, w_first], bar, w_bufs.index(slot), live)
    if TAIL > 0 and PACKED:
        load_tile(tail_desc, [m + x_desc.block_type.shape[0], c * BLOCK_K], bar, tail_bufs.index(slot), live)
    elif TAIL > 0:
        load_tile(tail_desc, [n + w_desc.block_type.shape[0], w_first], bar, tail_bufs.index(slot), live)
    if factor_desc is not None:
        group = tap * tap_groups + c * BLOCK_K // GROUP_SIZE
        load_tile(factor_desc, [group, n], bar, factor_bufs.index(slot), live)
    c += 1
    if c == c_tiles:
        c = 0
        tap += 1
        if tap == TAPS_H * TAPS_W:
            tap = 0
            tile += gl.num_programs(0)
    return tile, tap, c, m, n, top, left


@gluon.jit
def words_of(factor):
    """Return the multiplier of each factor (`PackedWeight.factor`), and its other byte in all bytes of a word."""
    return gl.inline_asm_elementwise(
        """{
        and.b32 $0, $4, 0xFF;
        prmt.b32 $1, $4, 0, 0x4442;
        prmt.b32 $2, $4, 0, 0x1111;
        prmt.b32 $3, $4, 0, 0x3333;
        }""",
        "=r,=r,=r,=r,r",
        [factor],
        dtype=(gl.int32, gl.int32),
        is_pure=True,
        pack=2,
    )


@gluon.jit
def unpacked(packed, low, high):
    """Return the int8 numbers of the low and of the high 4 bits of bytes; `low` and `high` are words of their factors.

    Four codes lie in a word. Times the multiplier, plus 128 - multiplier * zero point, each of its bytes is within 0 to
    255: one multiply-add makes four numbers, all 128 too large, which is the sign bit (LiquidGEMM, arXiv:2509.01229).
    """
    return gl.inline_asm_elementwise(
        """{
        .reg .b32 low, high;
        and.b32 low, $2, 0x0F0F0F0F;
        shr.u32 high, $2, 4;
        and.b32 high, high, 0x0F0F0F0F;
        mad.lo.u32 low, low, $3, $7;
        mad.lo.u32 high, high, $11, $15;
        xor.b32 $0, low, 0x80808080;
        xor.b32 $1, high, 0x80808080;
        }""",
        "=r,=r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
        [packed, of_rows(low[0], packed), of_rows(low[1], packed), of_rows(high[0], packed), of_rows(high[1], packed)],
        dtype=(gl.int8, gl.int8),
        is_pure=True,
        pack=4,
    )


@gluon.jit
def multiply_unit(
    acc, tail, x, x_tail, w, low, high, factors, slot, AT: gl.constexpr, LANE: gl.constexpr, GROUP_SIZE: gl.constexpr,
    TAIL: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Add products of the bytes AT to AT + UNIT of packed rows; return the words of factors that they took."""
    # Columns of low bits: a block of LANE bytes holds twice as many codes. Those of high bits are LANE further.
    LOW: gl.constexpr = AT // LANE * 2 * LANE + AT % LANE
    HIGH: gl.constexpr = LOW + LANE
    if GROUP_SIZE > 0:
        GROUPS: gl.constexpr = (x.shape[1] + GROUP_SIZE - 1) // GROUP_SIZE
        if AT == 0 or LOW % GROUP_SIZE == 0:
            low = words_of(factors.index(slot * GROUPS + LOW // GROUP_SIZE).load(gl.SliceLayout(1, LAYOUT)))
        if LOW // GROUP_SIZE == HIGH // GROUP_SIZE:
            high = low
        elif AT == 0 or HIGH % GROUP_SIZE == 0:
            high = words_of(factors.index(slot * GROUPS + HIGH // GROUP_SIZE).load(gl.SliceLayout(1, LAYOUT)))
    left, right = unpacked(w.slice(AT, UNIT, 1).load(LAYOUT), low, high)
    acc = warpgroup_mma(left, x.slice(LOW, UNIT, 1).permute((1, 0)), acc, is_async=True)
    acc = warpgroup_mma(right, x.slice(HIGH, UNIT, 1).permute((1, 0)), acc, is_async=True)
    # All of them stay in flight. Those of the unit before have ended, and the registers of its weights are free.
    if TAIL > 0:
        tail = warpgroup_mma(left, x_tail.slice(LOW, UNIT, 1).permute((1, 0)), tail, is_async=True)
        tail = warpgroup_mma(right, x_tail.slice(HIGH, UNIT, 1).permute((1, 0)), tail, is_async=True)
        acc, tail = warpgroup_mma_wait(4, (acc, tail))
    else:
        acc = warpgroup_mma_wait(2, (acc,))
        tail = acc
    return acc, tail, low, high


# One compilation for all sizes: these integers are never known to be 1, or multiples of 16.
@gluon.jit(
    do_not_specialize=["M", "tiles_m", "tiles_h", "tiles_w", "H", "W", "rows_per_scale", "rows_per_gate", "tap_groups"]
)
def product_kernel(
    x_desc,  # (M, K), or (B, H, W, C) of a convolution: int8 or float8e4nv
    w_desc,  # (N, taps * tap_bytes), of packed weights uint8
    out_desc,  # (M, N), or (B, H, W, N)
    tail_desc,  # the same weight, or beside packed ones the same codes, and output in blocks of TAIL, or None
    out_tail_desc,
    factor_desc,  # (G, N) int16 of packed weights with groups, or None
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
    GROUP_SIZE: gl.constexpr,
    LANE: gl.constexpr,
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
    TAIL: gl.constexpr,
    TAIL_LAYOUT: gl.constexpr,
):
    """Tiles of codes times codes, summed in SUM and scaled in float32; each program takes every nth tile.

    Tensors have powers of two of columns, and the layers of SDXL multiples of 160 and 320: so a tile may have a tail of
    TAIL columns beside its BLOCK_N, multiplied with the same rows, or beside packed weights TAIL rows.

    With a GROUP_SIZE, so many columns share a scale: their sum ends with the last of them, is scaled and added in
    float32. Nothing is in flight meanwhile in this program; others on the same multiprocessor multiply.

    Packed weights (`w_desc` of uint8) have blocks of LANE bytes, and a factor for each GROUP_SIZE columns, or with 0 a
    zero point for all.
    """
    CONV: gl.constexpr = len(x_desc.block_type.shape) == 4
    TAPS: gl.constexpr = TAPS_H * TAPS_W
    PACKED: gl.constexpr = w_desc.dtype == gl.uint8
    GROUP_STEPS: gl.constexpr = 0 if PACKED else GROUP_SIZE // BLOCK_K
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, LAYOUT, 4)
    COLUMNS: gl.constexpr = BLOCK_N if PACKED else BLOCK_N + TAIL
    x_bufs = gl.allocate_shared_memory(x_desc.dtype, [STAGES] + x_desc.block_type.shape, x_desc.layout)  # noqa: RUF005
    w_bufs = gl.allocate_shared_memory(w_desc.dtype, [STAGES] + w_desc.block_type.shape, w_desc.layout)  # noqa: RUF005
    out_buf = gl.allocate_shared_memory(out_desc.dtype, out_desc.block_type.shape, out_desc.layout)
    tail_bufs, out_tail_buf = w_bufs, out_buf
    if TAIL > 0:
        gl.static_assert(GROUP_STEPS == 0, "no tails with groups")
        shape: gl.constexpr = [STAGES] + tail_desc.block_type.shape  # noqa: RUF005
        tail_bufs = gl.allocate_shared_memory(tail_desc.dtype, shape, tail_desc.layout)
        out_tail_buf = gl.allocate_shared_memory(out_desc.dtype, out_tail_desc.block_type.shape, out_tail_desc.layout)
    factor_bufs, factors = w_bufs, w_bufs
    if factor_desc is not None:
        GROUPS: gl.constexpr = factor_desc.block_type.shape[0]
        factor_bufs = gl.allocate_shared_memory(gl.int16, [STAGES, GROUPS, BLOCK_N], factor_desc.layout)
        # The same memory with a row for each group.
        ROW: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=16, rank=1)
        factors = reinterpret(factor_bufs, gl.int16, [STAGES * GROUPS, BLOCK_N], ROW)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(bars.index(i), count=1)
    tiles_n = gl.cdiv(N, COLUMNS)
    c_tiles = gl.cdiv(C, BLOCK_K)
    grid = (tiles_m, tiles_n, c_tiles, tiles_h, tiles_w, tap_bytes, tap_groups)
    buffers = (bars, x_bufs, w_bufs, tail_bufs, factor_bufs)
    next_tile, next_tap, next_c = gl.program_id(0), 0, 0
    next_m, next_n, next_top, next_left = 0, 0, 0, 0
    for i in gl.static_range(STAGES - 1):
        next_tile, next_tap, next_c, next_m, next_n, next_top, next_left = issue(
            i, next_tile, next_tap, next_c, next_m, next_n, next_top, next_left, grid, x_desc, w_desc, tail_desc,
            factor_desc, buffers, TAPS_H, TAPS_W, PAD_H, PAD_W, SWIZZLE, STAGES, TAIL, GROUP_SIZE,
        )  # fmt: skip
    count = 0
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        tile_m, tile_n = tile_of(tile, tiles_m, tiles_n, SWIZZLE)
        first = tile_n * COLUMNS
        if PACKED:
            acc = gl.zeros((BLOCK_N, BLOCK_M), dtype=SUM, layout=LAYOUT)
            tail = acc
            # Without the wait, ptxas takes the zeros for part of the products in flight, and waits for each of these.
            if TAIL > 0:
                tail = gl.zeros((BLOCK_N, TAIL), dtype=SUM, layout=TAIL_LAYOUT)
                acc, tail = warpgroup_mma_wait(0, (acc, tail))
            else:
                acc = warpgroup_mma_wait(0, (acc,))
            factor = gl.zeros((BLOCK_N,), dtype=gl.int16, layout=gl.SliceLayout(1, WEIGHTS))
            if GROUP_SIZE == 0:
                channel = first + gl.arange(0, BLOCK_N, gl.SliceLayout(1, WEIGHTS))
                zero = gl.load(zero_ptr + channel, mask=channel < N, other=0).to(gl.int32)
                factor = ((128 - zero) * 256 + 1).to(gl.int16)
            low = words_of(factor)
            high = low
        else:
            acc = gl.zeros((BLOCK_M, BLOCK_N), dtype=SUM, layout=LAYOUT)
            if TAIL > 0:
                tail = gl.zeros((BLOCK_M, TAIL), dtype=SUM, layout=TAIL_LAYOUT)
        if GROUP_STEPS > 0:
            n = first + gl.arange(0, BLOCK_N, gl.SliceLayout(0, LAYOUT))
            in_n = n < N
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
            if PACKED:
                for at in gl.static_range(0, BLOCK_K // 2, UNIT):
                    acc, tail, low, high = multiply_unit(
                        acc, tail, x, tail_bufs.index(slot), w_bufs.index(slot), low, high, factors, slot, at, LANE,
                        GROUP_SIZE, TAIL, WEIGHTS,
                    )  # fmt: skip
            elif GROUP_STEPS > 0:
                acc = warpgroup_mma(x, w, acc, use_acc=c % GROUP_STEPS != 0, is_async=True)
                acc = warpgroup_mma_wait(0, (acc,))
            elif TAIL > 0:
                acc = warpgroup_mma(x, w, acc, is_async=True)
                tail = warpgroup_mma(x, tail_bufs.index(slot).permute((1, 0)), tail, is_async=True)
                acc, tail = warpgroup_mma_wait(2, (acc, tail))
            else:
                acc = warpgroup_mma(x, w, acc, is_async=True)
                # One product stays in flight; the one before has ended, and its buffers are free.
                acc = warpgroup_mma_wait(1, (acc,))
            next_tile, next_tap, next_c, next_m, next_n, next_top, next_left = issue(
                count + STAGES - 1, next_tile, next_tap, next_c, next_m, next_n, next_top, next_left, grid,
                x_desc, w_desc, tail_desc, factor_desc, buffers, TAPS_H, TAPS_W, PAD_H, PAD_W, SWIZZLE, STAGES, TAIL,
                GROUP_SIZE,
            )  # fmt: skip
            if GROUP_STEPS > 0:
                if (c % GROUP_STEPS == GROUP_STEPS - 1) | (c == c_tiles - 1):
                    value = gl.fma(acc.to(gl.float32), broadcast(scale, value), value)
                c += 1
                if c == c_tiles:
                    c = 0
                    tap += 1
            count += 1
        m = tile_m * (BLOCK_M + TAIL if PACKED else BLOCK_M)
        place = (tile_m, m, M, N, H, W, tiles_h, tiles_w)
        added = (bias_ptr, gate_ptr, residual_ptr, rows_per_gate, stride_gate, stride_residual)
        scales = (x_scale_ptr, x_zero_ptr, x_sum_ptr, scale_ptr, zero_ptr, total_ptr, rows_per_scale)
        if GROUP_STEPS > 0:
            acc = warpgroup_mma_wait(0, (acc,))
            finish(
                acc, value, first, place, scales, added, x_desc, out_desc, out_buf, GROUP_STEPS, TAPS_H, TAPS_W,
                PAD_H, PAD_W, BLOCK_M, BLOCK_N, HALVES, False,
            )  # fmt: skip
        else:
            # The tail first, so that its registers are free for the rest.
            if TAIL > 0:
                acc, tail = warpgroup_mma_wait(0, (acc, tail))
            else:
                acc = warpgroup_mma_wait(0, (acc,))
            if PACKED:
                acc = gl.permute(acc, (1, 0))
            if TAIL > 0 and PACKED:
                tail = gl.permute(tail, (1, 0))
                after = (tile_m, m + BLOCK_M, M, N, H, W, tiles_h, tiles_w)
                finish(
                    tail, tail, first, after, scales, added, x_desc, out_tail_desc, out_tail_buf, 0, TAPS_H, TAPS_W,
                    PAD_H, PAD_W, TAIL, BLOCK_N, 1, PACKED,
                )  # fmt: skip
            elif TAIL > 0:
                finish(
                    tail, tail, first + BLOCK_N, place, scales, added, x_desc, out_tail_desc, out_tail_buf, 0, TAPS_H,
                    TAPS_W, PAD_H, PAD_W, BLOCK_M, TAIL, 1, PACKED,
                )  # fmt: skip
            finish(
                acc, acc, first, place, scales, added, x_desc, out_desc, out_buf, 0, TAPS_H, TAPS_W, PAD_H, PAD_W,
                BLOCK_M, BLOCK_N, HALVES, PACKED,
            )  # fmt: skip
    tma.store_wait(0)


@gluon.jit
def finish(
    acc, value, first, place, scales, added, x_desc, out_desc, out_buf, GROUP_STEPS: gl.constexpr,
    TAPS_H: gl.constexpr, TAPS_W: gl.constexpr, PAD_H: gl.constexpr, PAD_W: gl.constexpr, BLOCK_M: gl.constexpr,
    WIDTH: gl.constexpr, HALVES: gl.constexpr, TRANSPOSED: gl.constexpr,
):  # fmt: skip
    """Correct, scale, add to and write the sums `acc`, or with groups the scaled `value`, of WIDTH columns from `first`
    on.

    TRANSPOSED sums lie in registers as those of (WIDTH, BLOCK_M): a thread has many rows of a few columns. So what is
    known of rows is computed once for each, and then given to all threads.
    """
    CONV: gl.constexpr = len(x_desc.block_type.shape) == 4
    TAPS: gl.constexpr = TAPS_H * TAPS_W
    LAYOUT: gl.constexpr = acc.type.layout
    ROWS: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0]) if TRANSPOSED else gl.SliceLayout(1, LAYOUT)
    tile_m, m_first, M, N, H, W, tiles_h, tiles_w = place
    bias_ptr, gate_ptr, residual_ptr, rows_per_gate, stride_gate, stride_residual = added
    x_scale_ptr, x_zero_ptr, x_sum_ptr, scale_ptr, zero_ptr, total_ptr, rows_per_scale = scales
    n = first + gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT))
    in_n = n < N
    image, top, left = 0, 0, 0
    if CONV:
        image = tile_m // (tiles_h * tiles_w)
        top = tile_m % (tiles_h * tiles_w) // tiles_w * x_desc.block_type.shape[1]
        left = tile_m % tiles_w * x_desc.block_type.shape[2]
    m, in_m, y, x_at = rows_of(m_first, image, top, left, M, H, W, x_desc, BLOCK_M, ROWS)
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
            acc -= spread(x_zero, LAYOUT) * sums[None, :]
            if PAD_H > 0 or PAD_W > 0:
                # A tap that falls on padding has no part in the correction.
                for tap in range(TAPS):
                    outside = is_outside(y, x_at, tap, H, W, TAPS_W, PAD_H, PAD_W) & in_m
                    if gl.max(outside.to(gl.int32), axis=0) > 0:
                        total = gl.load(total_ptr + n * TAPS + tap, mask=in_n, other=0).to(gl.int32)
                        acc += spread(gl.where(outside, x_zero, 0), LAYOUT) * total[None, :]
        if x_sum_ptr is not None:
            x_sum = gl.load(x_sum_ptr + m, mask=in_m, other=0)
            acc -= x_sum[:, None] * gl.load(zero_ptr + n, mask=in_n, other=0).to(gl.int32)[None, :]
        value = acc.to(gl.float32) * gl.load(scale_ptr + n, mask=in_n, other=0.0).to(gl.float32)[None, :]
    value = value * spread(gl.load(x_scale_ptr + m // rows_per_scale, mask=in_m, other=0.0), LAYOUT)
    if bias_ptr is not None:
        value += gl.load(bias_ptr + n, mask=in_n, other=0.0).to(gl.float32)[None, :]
    if gate_ptr is not None and not TRANSPOSED:
        at = gate_ptr + (m // rows_per_gate).to(gl.int64)[:, None] * stride_gate + n[None, :]
        value = value * gl.load(at, mask=in_m[:, None] & in_n[None, :], other=0.0).to(gl.float32)
    if residual_ptr is not None and not TRANSPOSED:
        at = residual_ptr + m.to(gl.int64)[:, None] * stride_residual + n[None, :]
        value += gl.load(at, mask=in_m[:, None] & in_n[None, :], other=0.0).to(gl.float32)
    PART: gl.constexpr = WIDTH // HALVES
    # Of a gate and a residual, 16 bytes in a row to each thread.
    BLOCK: gl.constexpr = gl.BlockedLayout([1, 8], [256 // PART, PART // 8], [gl.num_warps(), 1], [1, 0])
    buf = out_buf.reshape((BLOCK_M, PART)) if CONV else out_buf
    for half in gl.static_range(HALVES):
        part = value
        if HALVES == 2:
            part = value.reshape((BLOCK_M, 2, PART)).permute((0, 2, 1)).split()[half]
        column = first + half * PART
        tma.store_wait(0)
        if TRANSPOSED and (gate_ptr is not None or residual_ptr is not None):
            m, in_m, y, x_at = rows_of(m_first, image, top, left, M, H, W, x_desc, BLOCK_M, gl.SliceLayout(1, BLOCK))
            n = column + gl.arange(0, PART, gl.SliceLayout(0, BLOCK))
            mask = in_m[:, None] & (n < N)[None, :]
            if gate_ptr is not None:
                at = gate_ptr + (m // rows_per_gate).to(gl.int64)[:, None] * stride_gate + n[None, :]
                part *= turned(at, mask, buf, part)
            if residual_ptr is not None:
                at = residual_ptr + m.to(gl.int64)[:, None] * stride_residual + n[None, :]
                part += turned(at, mask, buf, part)
        buf.store(part.to(out_desc.dtype))
        fence_async_shared()
        # The copy to global memory goes on while the next tile is computed.
        if CONV:
            store_tile(out_desc, [image, top, left, column], out_buf)
        else:
            store_tile(out_desc, [m_first, column], out_buf)


@gluon.jit
def rows_of(first, image, top, left, M, H, W, x_desc, BLOCK_M: gl.constexpr, LAYOUT: gl.constexpr):
    """Return the rows of a tile, which of them there are, and of a convolution the pixels that they are."""
    row = gl.arange(0, BLOCK_M, LAYOUT)
    y, x_at = row, row
    if len(x_desc.block_type.shape) == 4:
        y = top + row // x_desc.block_type.shape[2]
        x_at = left + row % x_desc.block_type.shape[2]
        m = (image * H + y) * W + x_at
        in_m = (y < H) & (x_at < W)
    else:
        m = first + row
        in_m = m < M
    return m, in_m, y, x_at


@gluon.jit
def turned(at, mask, buf, like):
    """Load a tile by rows, and give it through shared memory to the threads that have the sums `like`."""
    LAYOUT: gl.constexpr = like.type.layout
    buf.store(gl.load(at, mask=mask, other=0.0))
    return buf.load(LAYOUT).to(gl.float32)


@gluon.jit
def spread(rows, LAYOUT: gl.constexpr):
    """Give a value of each row to the threads that have the row's sums."""
    return gl.convert_layout(rows, gl.SliceLayout(1, LAYOUT))[:, None]


@gluon.jit
def broadcast(columns, like):
    """Repeat a row of columns for every row of a tile."""
    return columns[None, :] + gl.zeros_like(like)


@gluon.jit
def of_rows(rows, like):
    """Repeat a column of int32 for every column of a tile."""
    return rows[:, None] + gl.zeros_like(like).to(gl.int32)


@gluon.jit
def is_outside(y, x, tap, H, W, TAPS_W: gl.constexpr, PAD_H: gl.constexpr, PAD_W: gl.constexpr):
    """Whether a tap of these pixels falls on padding."""
    row = y + (tap // TAPS_W - PAD_H)
    col = x + (tap % TAPS_W - PAD_W)
    return (row < 0) | (row >= H) | (col < 0) | (col >= W)
