"""Triton twin of `kernels.norms`.

What is normalized was rounded, so that quotients are products with inverses: exact divisions would make no code right.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._triton.activations import BLOCK, channel_block, empty_quantized, fuses, row_view, token_blocks
from kernels._triton.common import code_near, grid_of, inverse_of, load_columns
from kernels._triton.fp8 import check_hardware, near_e4m3
from kernels.activations import quantize_by_table_reference
from kernels.fp8 import FP8, FP8_MAX, SCALE_FLOOR

# Elements of a block of channel_stats_kernel, and blocks of a chunk.
STATS_ELEMENTS = 4096
STATS_BLOCKS = 4
MAX_CHUNKS = 64


@triton.jit
def channel_stats_kernel(
    x_ptr,  # (B, P, C)
    mean_ptr,  # (B, chunks, C) float32
    squares_ptr,  # (B, chunks, C) float32
    P,
    C,
    chunk,
    stride_b,
    stride_p,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Mean, and sum of squared distances from it, of BLOCK_C channels over one chunk of pixels.

    Distances are summed from the chunk's first pixel, which is some standard deviations from the mean at most, so that
    little is lost when its part is subtracted in the end; nothing is added up across threads before that.
    """
    image = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * chunk
    stop = tl.minimum(start + chunk, P)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < C
    rows = x_ptr + image * stride_b
    first = tl.load(rows + start.to(tl.int64) * stride_p + c, mask=in_c, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    squares = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    for p0 in range(0, chunk, BLOCK_P):
        p = start + p0 + tl.arange(0, BLOCK_P)
        mask = (p < stop)[:, None] & in_c[None, :]
        x = tl.load(rows + p.to(tl.int64)[:, None] * stride_p + c[None, :], mask=mask, other=0.0).to(tl.float32)
        far = tl.where(mask, x - first[None, :], 0.0)
        total += far
        squares = tl.fma(far, far, squares)
    count = (stop - start).to(tl.float32)
    far = tl.sum(total, axis=0) / count
    spread = tl.sum(squares, axis=0) - far * far * count
    at = (image * tl.num_programs(1) + tl.program_id(1)) * C + c
    tl.store(mean_ptr + at, first + far, mask=in_c)
    # A small negative difference is 0; NaN stays.
    tl.store(squares_ptr + at, tl.where(spread < 0.0, 0.0, spread), mask=in_c)


# P must not become a constant where it is 1: it is cast.
@triton.jit(do_not_specialize=["P"])
def merge_stats_kernel(
    mean_ptr,  # (B, chunks, C)
    squares_ptr,
    group_mean_ptr,  # (B, GROUPS)
    group_rstd_ptr,
    P,
    chunk,
    chunks,
    eps,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Put the chunks of the channels of one group together (Chan, Golub and LeVeque 1979)."""
    row = tl.program_id(0)
    part, w = tl.arange(0, CHUNKS), tl.arange(0, BLOCK_W)
    used = (part < chunks)[:, None] & (w < WIDTH)[None, :]
    at = (row // GROUPS * chunks + part)[:, None] * (GROUPS * WIDTH) + (row % GROUPS * WIDTH + w)[None, :]
    pixels = tl.maximum(tl.minimum(P - part * chunk, chunk), 0).to(tl.float32)
    count = tl.where(used, pixels[:, None], 0.0)
    mean = tl.load(mean_ptr + at, mask=used, other=0.0)
    squares = tl.load(squares_ptr + at, mask=used, other=0.0)
    n = (P * WIDTH).to(tl.float32)
    centre = tl.sum(tl.sum(mean * count, axis=1), axis=0) / n
    spread = tl.sum(tl.sum(squares + count * (mean - centre) * (mean - centre), axis=1), axis=0)
    tl.store(group_mean_ptr + row, centre)
    tl.store(group_rstd_ptr + row, 1.0 / tl.sqrt_rn(spread / n + eps))


@triton.jit
def group_norm_quantize_kernel(
    x_ptr,  # (M, C), M = B * P
    group_mean_ptr,
    group_rstd_ptr,
    weight_ptr,
    bias_ptr,
    scale_ptr,  # (S,)
    zero_ptr,
    index_ptr,
    divisor_ptr,  # (S, C) or None
    codes_ptr,
    run_scale_ptr,
    run_zero_ptr,
    C,
    P,
    images_per_run,
    stride_x,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    SILU: tl.constexpr,
    TOP: tl.constexpr,
    HALF: tl.constexpr,
    FUSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Normalize, apply SiLU and quantize one tile of an image: the normalized image is never written."""
    image = tl.program_id(0)
    pixel = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    m = image.to(tl.int64) * P + pixel
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < C
    mask = (pixel < P)[:, None] & in_c[None, :]
    group = image * GROUPS + c // WIDTH
    mean = tl.load(group_mean_ptr + group, mask=in_c, other=0.0)
    rstd = tl.load(group_rstd_ptr + group, mask=in_c, other=0.0)
    x = tl.load(x_ptr + m[:, None] * stride_x + c[None, :], mask=mask, other=0.0).to(tl.float32)
    by, add = rstd, tl.zeros((BLOCK_C,), dtype=tl.float32)
    if weight_ptr is not None:
        by *= tl.load(weight_ptr + c, mask=in_c, other=0.0).to(tl.float32)
        add = tl.load(bias_ptr + c, mask=in_c, other=0.0).to(tl.float32)
    x = multiplied(x - mean[None, :], by[None, :], add[None, :], FUSED)
    if SILU:
        x = x / (1.0 + tl.exp(-x))
    run = image // images_per_run
    step = tl.zeros((), dtype=tl.int64)
    if index_ptr is not None:
        step = tl.load(index_ptr + run)
    scale = tl.load(scale_ptr + step)
    zero = tl.load(zero_ptr + step)
    divisor = tl.full((BLOCK_C,), 1.0, tl.float32) * scale
    if divisor_ptr is not None:
        divisor = tl.load(divisor_ptr + step * C + c, mask=in_c, other=1.0)
    codes = code_near(x * inverse_of(divisor)[None, :], zero, TOP, HALF)
    tl.store(codes_ptr + m[:, None] * C + c[None, :], codes, mask=mask)
    if (image % images_per_run == 0) & (tl.program_id(1) == 0) & (tl.program_id(2) == 0):
        tl.store(run_scale_ptr + run, scale)
        tl.store(run_zero_ptr + run, zero.to(tl.int32) - HALF)


@triton.jit
def multiplied(x, by, add, FUSED: tl.constexpr):
    """x * by + add, in one instruction where that rounds once."""
    return tl.fma(x, tl.broadcast_to(by, x.shape), tl.broadcast_to(add, x.shape)) if FUSED else x * by + add


@triton.jit
def layer_norm_quantize_kernel(
    x_ptr,  # (M, C)
    weight_ptr,  # (C,) or None
    bias_ptr,
    multiplier_ptr,  # (B, C) or None
    shift_ptr,
    scale_ptr,  # (S,), or None: the grid is each token's own
    zero_ptr,
    index_ptr,
    codes_ptr,  # (M, C) int8 or float8e4nv
    run_scale_ptr,  # (R,); (M,) for E4M3
    run_zero_ptr,  # (R,), or None for E4M3
    M,
    C,
    tokens,
    rows_per_run,
    stride_x,
    stride_multiplier,
    stride_shift,
    eps,
    TOP: tl.constexpr,  # 448 for E4M3
    HALF: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    FLOOR: tl.constexpr,  # least scale of E4M3
    FUSED: tl.constexpr,
    TOGETHER: tl.constexpr,  # whether the rows of a program are of one sample
    WHOLE: tl.constexpr,  # whether the blocks have no more columns than the rows
    ROWS: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Normalize, modulate and quantize some tokens, which stay in registers; blocks as of per_token_kernel."""
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_m = m < M
    a, c_a, mask_a = load_columns(x_ptr, m, in_m, C, stride_x, 0, BLOCK_A, WHOLE)
    total = tl.sum(a, axis=1)
    if BLOCK_B > 0:
        b, c_b, mask_b = load_columns(x_ptr, m, in_m, C, stride_x, BLOCK_A, BLOCK_B, WHOLE)
        total += tl.sum(b, axis=1)
    mean = total / C
    a = a - mean[:, None] if WHOLE else tl.where(mask_a, a - mean[:, None], 0.0)
    squares = tl.sum(a * a, axis=1)
    if BLOCK_B > 0:
        b = b - mean[:, None] if WHOLE else tl.where(mask_b, b - mean[:, None], 0.0)
        squares += tl.sum(b * b, axis=1)
    rstd = 1.0 / tl.sqrt_rn(squares / C + eps)
    # One number for all rows that are of one sample.
    image = tl.program_id(0).to(tl.int64) * ROWS // tokens + tl.zeros((1,), dtype=tl.int64) if TOGETHER else m // tokens
    by, add = image * stride_multiplier, image * stride_shift
    a = a * rstd[:, None]
    a = modulated(a, c_a, mask_a, by, add, C, weight_ptr, bias_ptr, multiplier_ptr, shift_ptr, FUSED, TOGETHER, WHOLE)
    if BLOCK_B > 0:
        b = b * rstd[:, None]
        b = modulated(
            b, c_b, mask_b, by, add, C, weight_ptr, bias_ptr, multiplier_ptr, shift_ptr, FUSED, TOGETHER, WHOLE
        )
    zero = tl.zeros((ROWS,), dtype=tl.float32)
    if scale_ptr is None:
        low, high, odd = tl.min(a, axis=1), tl.max(a, axis=1), tl.sum(a, axis=1)
        if BLOCK_B > 0:
            low, high = tl.minimum(low, tl.min(b, axis=1)), tl.maximum(high, tl.max(b, axis=1))
            odd += tl.sum(b, axis=1)
        if run_zero_ptr is None:
            most = tl.maximum(-low, high)
            scale = tl.maximum(tl.div_rn(most, tl.full(most.shape, TOP, tl.float32)), FLOOR)
        else:
            scale, zero = grid_of(low, high, TOP, HALF, SYMMETRIC)
        scale += odd - odd  # NaN, if a value is not finite
    else:
        step = tl.zeros((ROWS,), dtype=tl.int64)
        if index_ptr is not None:
            step = tl.load(index_ptr + m // rows_per_run, mask=in_m, other=0)
        scale = tl.load(scale_ptr + step)
        if run_zero_ptr is not None:
            zero = tl.load(zero_ptr + step)
    # Each row's own for E4M3, each run's else.
    first = in_m if run_zero_ptr is None else in_m & (m % rows_per_run == 0)
    run = m if run_zero_ptr is None else m // rows_per_run
    tl.store(run_scale_ptr + run, scale, mask=first)
    if run_zero_ptr is not None:
        tl.store(run_zero_ptr + run, zero.to(tl.int32) - HALF, mask=first)
    inverse = inverse_of(scale)[:, None]
    at = codes_ptr + m[:, None] * C
    if run_zero_ptr is None:
        tl.store(at + c_a[None, :], numbers(a * inverse, codes_ptr, TOP, FUSED), mask=mask_a)
    else:
        tl.store(at + c_a[None, :], code_near(a * inverse, zero[:, None], TOP, HALF), mask=mask_a)
    if BLOCK_B > 0:
        if run_zero_ptr is None:
            tl.store(at + c_b[None, :], numbers(b * inverse, codes_ptr, TOP, FUSED), mask=mask_b)
        else:
            codes = code_near(b * inverse, zero[:, None], TOP, HALF)
            tl.store(at + c_b[None, :], codes, mask=mask_b)


@triton.jit
def numbers(x, out_ptr, MAX: tl.constexpr, FUSED: tl.constexpr):
    """E4M3 numbers of quotients, as `out_ptr` holds them."""
    return near_e4m3(x, MAX, FUSED).to(out_ptr.dtype.element_ty)


@triton.jit
def modulated(
    x, c, mask, by, add, C, weight_ptr, bias_ptr, multiplier_ptr, shift_ptr, FUSED: tl.constexpr,
    TOGETHER: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Apply a norm's weight and bias, and a sample's modulation, to some columns; zeros beyond the row stay.

    `by` and `add` are where the modulation of each row begins, or of all rows that are TOGETHER.
    """
    in_c = tl.full((1, c.shape[0]), 1, tl.int1) if WHOLE else (c < C)[None, :]
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + c[None, :], mask=in_c, other=0.0).to(tl.float32)
        bias = tl.zeros_like(weight)
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + c[None, :], mask=in_c, other=0.0).to(tl.float32)
        x = multiplied(x, weight, bias, FUSED)
    elif bias_ptr is not None:
        x += tl.load(bias_ptr + c[None, :], mask=in_c, other=0.0).to(tl.float32)
    if multiplier_ptr is not None:
        there = in_c if TOGETHER else mask
        multiplier = tl.load(multiplier_ptr + by[:, None] + c[None, :], mask=there, other=0.0).to(tl.float32)
        shift = tl.load(shift_ptr + add[:, None] + c[None, :], mask=there, other=0.0).to(tl.float32)
        x = multiplied(x, multiplier, shift, FUSED)
    return x


def launch_group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    silu: bool,
    grid: tuple[Tensor, Tensor, Tensor | None, Tensor | None, int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the three kernels of a group norm; `grid` is (scale, zero_point, index, divisor, bits)."""
    scale, zero_point, index, divisor, bits = grid
    divisor = None if divisor is None else divisor.contiguous()
    if x.numel() == 0:
        return quantize_by_table_reference(x, scale, zero_point, index, divisor, bits)
    weight, bias = (None if each is None else each.contiguous() for each in (weight, bias))
    batch, channels = x.shape[0], x.shape[-1]
    rows = row_view(x)
    pixels, width = rows.shape[0] // batch, channels // groups
    runs = 1 if index is None else index.numel()
    codes, run_scale, run_zero = empty_quantized(x, runs)
    block_c = min(128, channel_block(channels))
    block_p = STATS_ELEMENTS // block_c
    # Enough chunks to fill a device, each of several blocks.
    chunk = max(STATS_BLOCKS * block_p, triton.cdiv(pixels, MAX_CHUNKS))
    chunks = triton.cdiv(pixels, chunk)
    mean, squares = (torch.empty(batch, chunks, channels, device=x.device) for _ in range(2))
    group_mean, group_rstd = (torch.empty(batch, groups, device=x.device) for _ in range(2))
    channel_stats_kernel[(batch, chunks, triton.cdiv(channels, block_c))](
        rows, mean, squares, pixels, channels, chunk, pixels * rows.stride(0), rows.stride(0),
        BLOCK_P=block_p, BLOCK_C=block_c, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    block_w, block_chunks = triton.next_power_of_2(width), triton.next_power_of_2(chunks)
    merge_stats_kernel[(batch * groups,)](
        mean, squares, group_mean, group_rstd, pixels, chunk, chunks, eps,
        GROUPS=groups, WIDTH=width, CHUNKS=block_chunks, BLOCK_W=block_w,
        num_warps=1 if block_w * block_chunks <= 1024 else 4, enable_fp_fusion=False,
    )  # fmt: skip
    block_c = channel_block(channels)
    block_m = BLOCK // block_c
    group_norm_quantize_kernel[(batch, triton.cdiv(pixels, block_m), triton.cdiv(channels, block_c))](
        rows, group_mean, group_rstd, weight, bias, scale.float().contiguous(), zero_point.float().contiguous(),
        index, divisor, codes, run_scale, run_zero,
        channels, pixels, batch // runs, rows.stride(0),
        GROUPS=groups, WIDTH=width, SILU=silu, TOP=2**bits - 1, HALF=2 ** (bits - 1), FUSED=fuses(), BLOCK_M=block_m,
        BLOCK_C=block_c, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return codes, run_scale, run_zero


def launch_layer_norm(
    x: Tensor,
    affine: tuple[Tensor | None, Tensor | None, float],
    modulation: tuple[Tensor | None, Tensor | None],
    grid: tuple[Tensor | None, Tensor | None, Tensor | None, int],
    symmetric: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run `layer_norm_quantize_kernel`; `grid` is (scale or None, zero_point or None, index, bits)."""
    scale, zero_point, index, bits = grid
    if x.numel() == 0 and scale is not None and zero_point is not None:
        return quantize_by_table_reference(x, scale, zero_point, index, None, bits)
    runs = math.prod(x.shape[:-1]) if scale is None else 1 if index is None else index.numel()
    codes, run_scale, run_zero = empty_quantized(x, runs)
    zero_point = None if zero_point is None else zero_point.float().contiguous()
    _launch_layer_norm(
        x, affine, modulation, (scale, zero_point, index), (codes, run_scale, run_zero), runs,
        TOP=2**bits - 1, HALF=2 ** (bits - 1), SYMMETRIC=symmetric,
    )  # fmt: skip
    return codes, run_scale, run_zero


def launch_layer_norm_fp8(
    x: Tensor,
    affine: tuple[Tensor | None, Tensor | None, float],
    modulation: tuple[Tensor | None, Tensor | None],
    scale: Tensor | None,
    index: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Run the same kernel for E4M3 numbers: with scales of a table, or each token's own."""
    check_hardware(x)
    rows = math.prod(x.shape[:-1])
    values = torch.empty(x.shape, dtype=FP8, device=x.device)
    row_scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    runs = rows if scale is None else 1 if index is None else index.numel()
    _launch_layer_norm(
        x, affine, modulation, (scale, None, index), (values, row_scale, None), runs,
        TOP=FP8_MAX, HALF=0, SYMMETRIC=True,
    )  # fmt: skip
    return values, row_scale


def _launch_layer_norm(
    x: Tensor,
    affine: tuple[Tensor | None, Tensor | None, float],
    modulation: tuple[Tensor | None, Tensor | None],
    grid: tuple[Tensor | None, Tensor | None, Tensor | None],
    out: tuple[Tensor, Tensor, Tensor | None],
    runs: int,
    **constants: object,
) -> None:
    """Run `layer_norm_quantize_kernel`; `grid` is (scale, zero_point, index)."""
    weight, bias = (None if each is None else each.contiguous() for each in affine[:2])
    multiplier, shift = (None if each is None else row_view(each) for each in modulation)
    scale, zero_point, index = grid
    rows = row_view(x)
    m, channels = rows.shape
    blocks = token_blocks(channels)
    tokens = m // max(1, x.shape[0])
    layer_norm_quantize_kernel[(triton.cdiv(m, blocks.rows),)](
        rows, weight, bias, multiplier, shift, None if scale is None else scale.float().contiguous(), zero_point, index,
        *out, m, channels, tokens, m // max(1, runs), rows.stride(0),
        0 if multiplier is None else multiplier.stride(0), 0 if shift is None else shift.stride(0), affine[2],
        **constants, FLOOR=SCALE_FLOOR, FUSED=fuses(), TOGETHER=tokens % blocks.rows == 0, **blocks.constants,
        enable_fp_fusion=False,
    )  # fmt: skip
