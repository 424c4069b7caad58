"""Triton twin of `kernels.activations`."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._triton.common import code_of, grid_of, nan_unless_finite

BLOCK = 4096
TOKEN_BLOCK = 2048
SAMPLE_BLOCK = 2048
SAMPLE_CHUNKS = 256


@triton.jit
def by_table_kernel(
    x_ptr,  # (M, C)
    scale_ptr,  # (S,) float32
    zero_ptr,  # (S,) float32, unsigned
    index_ptr,  # (R,) int64 or None
    divisor_ptr,  # (S, C) float32 or None
    codes_ptr,  # (M, C) int8
    run_scale_ptr,  # (R,) float32
    run_zero_ptr,  # (R,) int32
    M,
    C,
    runs,
    rows_per_run,
    stride_x,
    TOP: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Codes of one tile; the first tile also writes each run's grid."""
    m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_m = m < M
    mask = in_m[:, None] & (c[None, :] < C)
    step = tl.zeros((BLOCK_M,), dtype=tl.int64)
    if index_ptr is not None:
        step = tl.load(index_ptr + m // rows_per_run, mask=in_m, other=0)
    zero = tl.load(zero_ptr + step, mask=in_m, other=0.0)[:, None]
    if divisor_ptr is not None:
        divisor = tl.load(divisor_ptr + step[:, None] * C + c[None, :], mask=mask, other=1.0)
    else:
        divisor = tl.load(scale_ptr + step, mask=in_m, other=1.0)[:, None]
    x = tl.load(x_ptr + m[:, None] * stride_x + c[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(codes_ptr + m[:, None] * C + c[None, :], code_of(x, divisor, zero, TOP, HALF), mask=mask)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        for run in range(runs):
            entry = tl.zeros((), dtype=tl.int64)
            if index_ptr is not None:
                entry = tl.load(index_ptr + run)
            tl.store(run_scale_ptr + run, tl.load(scale_ptr + entry))
            tl.store(run_zero_ptr + run, tl.load(zero_ptr + entry).to(tl.int32) - HALF)


@triton.jit
def per_token_kernel(
    x_ptr,  # (M, C)
    channel_scale_ptr,  # (C,) float32 or None
    codes_ptr,
    scale_ptr,  # (M,)
    zero_ptr,  # (M,)
    C,
    stride_x,
    TOP: tl.constexpr,
    HALF: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One row: its range, then its codes."""
    m = tl.program_id(0).to(tl.int64)
    row = x_ptr + m * stride_x
    low = tl.zeros((BLOCK_C,), dtype=tl.float32)
    high = tl.zeros((BLOCK_C,), dtype=tl.float32)
    odd = tl.zeros((), dtype=tl.float32)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        x = tl.load(row + c, mask=c < C, other=0.0).to(tl.float32)
        if channel_scale_ptr is not None:
            x = tl.div_rn(x, tl.load(channel_scale_ptr + c, mask=c < C, other=1.0))
        low = tl.minimum(low, x)
        high = tl.maximum(high, x)
        odd += nan_unless_finite(x)
    scale, zero = grid_of(tl.min(low, axis=0), tl.max(high, axis=0), TOP, HALF, SYMMETRIC)
    scale += odd
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        x = tl.load(row + c, mask=c < C, other=0.0).to(tl.float32)
        divisor = scale
        if channel_scale_ptr is not None:
            divisor = scale * tl.load(channel_scale_ptr + c, mask=c < C, other=1.0)
        tl.store(codes_ptr + m * C + c, code_of(x, divisor, zero, TOP, HALF), mask=c < C)
    tl.store(scale_ptr + m, scale)
    tl.store(zero_ptr + m, zero.to(tl.int32) - HALF)


@triton.jit
def sample_range_kernel(
    x_ptr,  # (B, n), contiguous
    channel_scale_ptr,  # (C,) float32 or None
    low_ptr,  # (B, chunks) float32
    high_ptr,
    n,
    C,
    chunk,
    BLOCK_N: tl.constexpr,
):
    """Range of one chunk of one sample."""
    base = x_ptr + tl.program_id(0).to(tl.int64) * n
    start = tl.program_id(1).to(tl.int64) * chunk
    stop = tl.minimum(start + chunk, n)
    low = tl.zeros((BLOCK_N,), dtype=tl.float32)
    high = tl.zeros((BLOCK_N,), dtype=tl.float32)
    odd = tl.zeros((), dtype=tl.float32)
    for i0 in range(0, chunk, BLOCK_N):
        i = start + i0 + tl.arange(0, BLOCK_N)
        x = tl.load(base + i, mask=i < stop, other=0.0).to(tl.float32)
        if channel_scale_ptr is not None:
            x = tl.div_rn(x, tl.load(channel_scale_ptr + i % C, mask=i < stop, other=1.0))
        low = tl.minimum(low, x)
        high = tl.maximum(high, x)
        odd += nan_unless_finite(x)
    part = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(low_ptr + part, tl.min(low, axis=0) + odd)
    tl.store(high_ptr + part, tl.max(high, axis=0))


@triton.jit
def per_sample_kernel(
    x_ptr,
    channel_scale_ptr,
    low_ptr,
    high_ptr,
    codes_ptr,
    scale_ptr,  # (B,)
    zero_ptr,  # (B,)
    n,
    C,
    chunks,
    TOP: tl.constexpr,
    HALF: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Codes of one block of one sample, whose range each program puts together from the chunks'."""
    sample = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, CHUNKS)
    low = tl.load(low_ptr + sample * chunks + part, mask=part < chunks, other=0.0)
    high = tl.load(high_ptr + sample * chunks + part, mask=part < chunks, other=0.0)
    scale, zero = grid_of(tl.min(low, axis=0), tl.max(high, axis=0), TOP, HALF, SYMMETRIC)
    scale += nan_unless_finite(low)
    i = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    x = tl.load(x_ptr + sample * n + i, mask=i < n, other=0.0).to(tl.float32)
    divisor = scale
    if channel_scale_ptr is not None:
        divisor = scale * tl.load(channel_scale_ptr + i % C, mask=i < n, other=1.0)
    tl.store(codes_ptr + sample * n + i, code_of(x, divisor, zero, TOP, HALF), mask=i < n)
    if tl.program_id(1) == 0:
        tl.store(scale_ptr + sample, scale)
        tl.store(zero_ptr + sample, zero.to(tl.int32) - HALF)


def launch_by_table(
    x: Tensor, scale: Tensor, zero_point: Tensor, index: Tensor | None, divisor: Tensor | None, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Run `by_table_kernel`."""
    rows = row_view(x)
    m, columns = rows.shape
    runs = 1 if index is None else index.numel()
    codes, run_scale, run_zero = empty_quantized(x, runs)
    block_c = min(triton.next_power_of_2(max(columns, 1)), 512)
    block_m = max(1, BLOCK // block_c)
    divisor = None if divisor is None else divisor.contiguous()
    grid = (max(1, triton.cdiv(m, block_m)), max(1, triton.cdiv(columns, block_c)))
    by_table_kernel[grid](
        rows, scale.float().contiguous(), zero_point.float().contiguous(), index, divisor, codes, run_scale, run_zero,
        m, columns, runs, max(1, m // runs), rows.stride(0),
        TOP=2**bits - 1, HALF=2 ** (bits - 1), BLOCK_M=block_m, BLOCK_C=block_c, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return codes, run_scale, run_zero


def launch_dynamic(
    x: Tensor, runs: int, bits: int, symmetric: bool, channel: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Run `per_token_kernel`, or the two kernels of samples."""
    codes, scale, zero = empty_quantized(x, runs)
    channel = None if channel is None else channel.contiguous()
    top, half = 2**bits - 1, 2 ** (bits - 1)
    rows = row_view(x)
    if runs == rows.shape[0]:
        block_c = min(triton.next_power_of_2(rows.shape[1]), TOKEN_BLOCK)
        per_token_kernel[(runs,)](
            rows, channel, codes, scale, zero, rows.shape[1], rows.stride(0),
            TOP=top, HALF=half, SYMMETRIC=symmetric, BLOCK_C=block_c, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
        return codes, scale, zero
    dense = x.contiguous()
    n = dense.numel() // runs
    chunks = min(triton.cdiv(n, SAMPLE_BLOCK), SAMPLE_CHUNKS)
    chunk = triton.cdiv(n, chunks)
    low = torch.empty(runs, chunks, dtype=torch.float32, device=x.device)
    high = torch.empty(runs, chunks, dtype=torch.float32, device=x.device)
    sample_range_kernel[(runs, chunks)](
        dense, channel, low, high, n, rows.shape[1], chunk, BLOCK_N=SAMPLE_BLOCK, num_warps=4, enable_fp_fusion=False
    )
    per_sample_kernel[(runs, triton.cdiv(n, SAMPLE_BLOCK))](
        dense, channel, low, high, codes, scale, zero, n, rows.shape[1], chunks,
        TOP=top, HALF=half, SYMMETRIC=symmetric, CHUNKS=triton.next_power_of_2(chunks), BLOCK_N=SAMPLE_BLOCK,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return codes, scale, zero


def row_view(x: Tensor) -> Tensor:
    """View (..., C) as (M, C) with contiguous rows, or copy it so."""
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.numel() == 0 else rows.contiguous()


def empty_quantized(x: Tensor, runs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate codes, scales and zero points."""
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(runs, dtype=torch.float32, device=x.device)
    return codes, scale, torch.empty(runs, dtype=torch.int32, device=x.device)
