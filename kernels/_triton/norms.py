"""Triton twin of `kernels.norms`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._triton.activations import BLOCK, empty_quantized, row_view
from kernels._triton.common import code_of, grid_of, nan_unless_finite
from kernels.activations import quantize_by_table_reference

STATS_ELEMENTS = 2048
MAX_CHUNKS = 64


@triton.jit
def group_stats_kernel(
    x_ptr,  # (B, P, C)
    mean_ptr,  # (B, GROUPS, chunks) float32
    squares_ptr,  # (B, GROUPS, chunks) float32
    P,
    chunk,
    stride_b,
    stride_p,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Mean, and sum of squared distances from it, of one group of channels over one chunk of pixels."""
    image = tl.program_id(0).to(tl.int64) // GROUPS
    group = tl.program_id(0) % GROUPS
    w = tl.arange(0, BLOCK_W)
    base = x_ptr + image * stride_b + group * WIDTH
    start = tl.program_id(1) * chunk
    stop = tl.minimum(start + chunk, P)
    total = tl.zeros((BLOCK_P, BLOCK_W), dtype=tl.float32)
    for p0 in range(0, chunk, BLOCK_P):
        p = (start + p0 + tl.arange(0, BLOCK_P)).to(tl.int64)
        mask = (p < stop)[:, None] & (w < WIDTH)[None, :]
        total += tl.load(base + p[:, None] * stride_p + w[None, :], mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(tl.sum(total, axis=1), axis=0) / ((stop - start) * WIDTH).to(tl.float32)
    squares = tl.zeros((BLOCK_P, BLOCK_W), dtype=tl.float32)
    for p0 in range(0, chunk, BLOCK_P):
        p = (start + p0 + tl.arange(0, BLOCK_P)).to(tl.int64)
        mask = (p < stop)[:, None] & (w < WIDTH)[None, :]
        x = tl.load(base + p[:, None] * stride_p + w[None, :], mask=mask, other=0.0).to(tl.float32)
        squares += tl.where(mask, (x - mean) * (x - mean), 0.0)
    part = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(mean_ptr + part, mean)
    tl.store(squares_ptr + part, tl.sum(tl.sum(squares, axis=1), axis=0))


@triton.jit
def merge_stats_kernel(
    mean_ptr,
    squares_ptr,
    group_mean_ptr,  # (B, GROUPS)
    group_rstd_ptr,
    P,
    chunk,
    chunks,
    eps,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Put the chunks of one group together (Chan, Golub and LeVeque 1979)."""
    row = tl.program_id(0)
    part = tl.arange(0, CHUNKS)
    used = part < chunks
    count = (tl.maximum(tl.minimum(P - part * chunk, chunk), 0) * WIDTH).to(tl.float32)
    mean = tl.load(mean_ptr + row * chunks + part, mask=used, other=0.0)
    squares = tl.load(squares_ptr + row * chunks + part, mask=used, other=0.0)
    n = (P * WIDTH).to(tl.float32)
    centre = tl.sum(mean * count, axis=0) / n
    spread = tl.sum(squares + count * (mean - centre) * (mean - centre), axis=0)
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
    M,
    C,
    P,
    runs,
    rows_per_run,
    stride_x,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    SILU: tl.constexpr,
    TOP: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Normalize, apply SiLU and quantize one tile: the normalized image is never written."""
    m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_m, in_c = m < M, c < C
    mask = in_m[:, None] & in_c[None, :]
    group = (m // P * GROUPS)[:, None] + (c // WIDTH)[None, :]
    mean = tl.load(group_mean_ptr + group, mask=mask, other=0.0)
    rstd = tl.load(group_rstd_ptr + group, mask=mask, other=0.0)
    x = tl.load(x_ptr + m[:, None] * stride_x + c[None, :], mask=mask, other=0.0).to(tl.float32)
    x = (x - mean) * rstd
    if weight_ptr is not None:
        x = x * tl.load(weight_ptr + c, mask=in_c, other=0.0).to(tl.float32)[None, :]
        x += tl.load(bias_ptr + c, mask=in_c, other=0.0).to(tl.float32)[None, :]
    if SILU:
        x = x / (1.0 + tl.exp(-x))
    step = tl.zeros((BLOCK_M,), dtype=tl.int64)
    if index_ptr is not None:
        step = tl.load(index_ptr + m // rows_per_run, mask=in_m, other=0)
    zero = tl.load(zero_ptr + step, mask=in_m, other=0.0)[:, None]
    if divisor_ptr is not None:
        divisor = tl.load(divisor_ptr + step[:, None] * C + c[None, :], mask=mask, other=1.0)
    else:
        divisor = tl.load(scale_ptr + step, mask=in_m, other=1.0)[:, None]
    tl.store(codes_ptr + m[:, None] * C + c[None, :], code_of(x, divisor, zero, TOP, HALF), mask=mask)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        for run in range(runs):
            entry = tl.zeros((), dtype=tl.int64)
            if index_ptr is not None:
                entry = tl.load(index_ptr + run)
            tl.store(run_scale_ptr + run, tl.load(scale_ptr + entry))
            tl.store(run_zero_ptr + run, tl.load(zero_ptr + entry).to(tl.int32) - HALF)


@triton.jit
def layer_norm_quantize_kernel(
    x_ptr,  # (M, C)
    weight_ptr,  # (C,) or None
    bias_ptr,
    mod_scale_ptr,  # (B, C) or None
    mod_shift_ptr,
    scale_ptr,  # (S,), or None: the grid is each token's own
    zero_ptr,
    index_ptr,
    codes_ptr,
    run_scale_ptr,
    run_zero_ptr,
    C,
    tokens,
    runs,
    rows_per_run,
    stride_x,
    stride_mod,
    eps,
    TOP: tl.constexpr,
    HALF: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Normalize, modulate and quantize one token, which stays in registers."""
    m = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    in_c = c < C
    x = tl.load(x_ptr + m * stride_x + c, mask=in_c, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=0) / C
    x = tl.where(in_c, x - mean, 0.0)
    x = x / tl.sqrt_rn(tl.sum(x * x, axis=0) / C + eps)
    if weight_ptr is not None:
        x = x * tl.load(weight_ptr + c, mask=in_c, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + c, mask=in_c, other=0.0).to(tl.float32)
    if mod_scale_ptr is not None:
        row = m // tokens * stride_mod + c
        x = x * (1.0 + tl.load(mod_scale_ptr + row, mask=in_c, other=0.0).to(tl.float32))
        x += tl.load(mod_shift_ptr + row, mask=in_c, other=0.0).to(tl.float32)
    if scale_ptr is None:
        scale, zero = grid_of(tl.min(x, axis=0), tl.max(x, axis=0), TOP, HALF, SYMMETRIC)
        scale += nan_unless_finite(x)
        tl.store(run_scale_ptr + m, scale)
        tl.store(run_zero_ptr + m, zero.to(tl.int32) - HALF)
    else:
        step = tl.zeros((), dtype=tl.int64)
        if index_ptr is not None:
            step = tl.load(index_ptr + m // rows_per_run)
        scale = tl.load(scale_ptr + step)
        zero = tl.load(zero_ptr + step)
        if m % rows_per_run == 0:
            tl.store(run_scale_ptr + m // rows_per_run, scale)
            tl.store(run_zero_ptr + m // rows_per_run, zero.to(tl.int32) - HALF)
    tl.store(codes_ptr + m * C + c, code_of(x, scale, zero, TOP, HALF), mask=in_c)


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
    block_w = triton.next_power_of_2(width)
    block_p = max(1, STATS_ELEMENTS // block_w)
    chunk = max(block_p, triton.cdiv(pixels, MAX_CHUNKS))
    chunks = triton.cdiv(pixels, chunk)
    mean, squares = (torch.empty(batch, groups, chunks, device=x.device) for _ in range(2))
    group_mean, group_rstd = (torch.empty(batch, groups, device=x.device) for _ in range(2))
    group_stats_kernel[(batch * groups, chunks)](
        rows, mean, squares, pixels, chunk, pixels * rows.stride(0), rows.stride(0),
        GROUPS=groups, WIDTH=width, BLOCK_P=block_p, BLOCK_W=block_w, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    merge_stats_kernel[(batch * groups,)](
        mean, squares, group_mean, group_rstd, pixels, chunk, chunks, eps,
        WIDTH=width, CHUNKS=triton.next_power_of_2(chunks), num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip
    block_c = min(triton.next_power_of_2(channels), 512)
    block_m = max(1, BLOCK // block_c)
    group_norm_quantize_kernel[(triton.cdiv(rows.shape[0], block_m), triton.cdiv(channels, block_c))](
        rows, group_mean, group_rstd, weight, bias, scale.float().contiguous(), zero_point.float().contiguous(),
        index, divisor, codes, run_scale, run_zero,
        rows.shape[0], channels, pixels, runs, rows.shape[0] // runs, rows.stride(0),
        GROUPS=groups, WIDTH=width, SILU=silu, TOP=2**bits - 1, HALF=2 ** (bits - 1), BLOCK_M=block_m,
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
    weight, bias, eps = affine
    mod_scale, mod_shift = modulation
    scale, zero_point, index, bits = grid
    if x.numel() == 0 and scale is not None and zero_point is not None:
        return quantize_by_table_reference(x, scale, zero_point, index, None, bits)
    weight, bias = (None if each is None else each.contiguous() for each in (weight, bias))
    rows = row_view(x)
    m, channels = rows.shape
    runs = m if scale is None else 1 if index is None else index.numel()
    codes, run_scale, run_zero = empty_quantized(x, runs)
    if scale is not None and zero_point is not None:
        scale, zero_point = scale.float().contiguous(), zero_point.float().contiguous()
    if mod_scale is not None and mod_shift is not None:
        mod_scale, mod_shift = mod_scale.contiguous(), mod_shift.contiguous()
    layer_norm_quantize_kernel[(m,)](
        rows, weight, bias, mod_scale, mod_shift, scale, zero_point, index, codes, run_scale, run_zero,
        channels, m // x.shape[0], runs, m // runs, rows.stride(0), channels, eps,
        TOP=2**bits - 1, HALF=2 ** (bits - 1), SYMMETRIC=symmetric, BLOCK_C=triton.next_power_of_2(channels),
        num_warps=8 if channels > 2048 else 4, enable_fp_fusion=False,
    )  # fmt: skip
    return codes, run_scale, run_zero
