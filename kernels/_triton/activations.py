"""Triton twin of `kernels.activations`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._triton.common import code_of, grid_of, inverse_of, load_columns, nan_unless_finite

BLOCK = 4096
# The longest row that a program keeps in registers.
TOKEN_BLOCK = 8192
# Columns of one warp; what is wider has several.
TOKEN_WARP = 1536
SAMPLE_BLOCK = 2048
SAMPLE_CHUNKS = 256


@triton.jit
def write_grids(scale_ptr, zero_ptr, index_ptr, run_scale_ptr, run_zero_ptr, run, HALF: tl.constexpr):
    """Write a run's grid, and return its entry in the table, its scale and its unsigned zero point."""
    step = tl.zeros((), dtype=tl.int64)
    if index_ptr is not None:
        step = tl.load(index_ptr + run)
    scale = tl.load(scale_ptr + step)
    zero = tl.load(zero_ptr + step)
    if (tl.program_id(1) == 0) & (tl.program_id(2) == 0):
        tl.store(run_scale_ptr + run, scale)
        tl.store(run_zero_ptr + run, zero.to(tl.int32) - HALF)
    return step, scale, zero


@triton.jit
def by_table_flat_kernel(
    x_ptr,  # (R, n), contiguous
    scale_ptr,  # (S,) float32
    zero_ptr,  # (S,) float32, unsigned
    index_ptr,  # (R,) int64 or None
    codes_ptr,  # (R, n) int8
    run_scale_ptr,  # (R,) float32
    run_zero_ptr,  # (R,) int32
    n,
    TOP: tl.constexpr,
    HALF: tl.constexpr,
    FUSED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Codes of one piece of a run whose values lie one after another, and have one divisor."""
    run = tl.program_id(0)
    _, scale, zero = write_grids(scale_ptr, zero_ptr, index_ptr, run_scale_ptr, run_zero_ptr, run, HALF)
    i = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    base = run.to(tl.int64) * n
    x = tl.load(x_ptr + base + i, mask=i < n, other=0.0).to(tl.float32)
    tl.store(codes_ptr + base + i, code_of(x, scale, inverse_of(scale), zero, TOP, HALF, FUSED), mask=i < n)


@triton.jit
def tile_of_run(run, rows_per_run, C, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return the rows and channels of a program's tile within a run, and which of them are there."""
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (row < rows_per_run)[:, None] & (c < C)[None, :]
    return run.to(tl.int64) * rows_per_run + row, c, mask


@triton.jit
def divisors(divisor_ptr, step, scale, c, C):
    """Return what channels are divided by at a step: divisors of their own, or the step's scale."""
    divisor = tl.full(c.shape, 1.0, tl.float32) * scale
    if divisor_ptr is not None:
        divisor = tl.load(divisor_ptr + step * C + c, mask=c < C, other=1.0)
    return divisor


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
    C,
    rows_per_run,
    stride_x,
    TOP: tl.constexpr,
    HALF: tl.constexpr,
    FUSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Codes of one tile of the rows of a run."""
    run = tl.program_id(0)
    step, scale, zero = write_grids(scale_ptr, zero_ptr, index_ptr, run_scale_ptr, run_zero_ptr, run, HALF)
    m, c, mask = tile_of_run(run, rows_per_run, C, BLOCK_M, BLOCK_C)
    divisor = divisors(divisor_ptr, step, scale, c, C)
    inverse = inverse_of(divisor)
    x = tl.load(x_ptr + m[:, None] * stride_x + c[None, :], mask=mask, other=0.0).to(tl.float32)
    # What an infinite divisor leaves out has code 0, also where it holds an infinity: a product with its inverse is 0.
    codes = code_of(x, divisor[None, :], inverse[None, :], zero, TOP, HALF, FUSED)
    tl.store(codes_ptr + m[:, None] * C + c[None, :], codes, mask=mask)


@triton.jit
def divided(x, c, C, channel_scale_ptr):
    """Divide columns by the scales of their channels; return those too."""
    channel = tl.full((x.shape[1],), 1.0, tl.float32)
    if channel_scale_ptr is not None:
        channel = tl.load(channel_scale_ptr + c, mask=c < C, other=1.0)
        x = tl.div_rn(x, tl.broadcast_to(channel[None, :], x.shape))
    return x, channel


@triton.jit
def store_tokens(
    codes_ptr, m, c, mask, x, scale, zero, channel, channel_scale_ptr, C,
    TOP: tl.constexpr, HALF: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    """Write the codes of some columns of rows with grids of their own."""
    if channel_scale_ptr is not None:
        divisor = scale[:, None] * channel[None, :]
        codes = code_of(x, divisor, inverse_of(divisor), zero[:, None], TOP, HALF, FUSED)
    else:
        codes = code_of(x, scale[:, None], inverse_of(scale)[:, None], zero[:, None], TOP, HALF, FUSED)
    tl.store(codes_ptr + m[:, None] * C + c[None, :], codes, mask=mask)


@triton.jit
def per_token_kernel(
    x_ptr,  # (M, C)
    channel_scale_ptr,  # (C,) float32 or None
    codes_ptr,
    scale_ptr,  # (M,)
    zero_ptr,  # (M,)
    M,
    C,
    stride_x,
    TOP: tl.constexpr,
    HALF: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    FUSED: tl.constexpr,
    WHOLE: tl.constexpr,  # whether the blocks have no more columns than the rows
    ROWS: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Some rows, each read once: their ranges, then their codes. Columns are BLOCK_A and, if any, BLOCK_B more."""
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_m = m < M
    a, c_a, mask_a = load_columns(x_ptr, m, in_m, C, stride_x, 0, BLOCK_A, WHOLE)
    seen, channel_a = divided(a, c_a, C, channel_scale_ptr)
    low, high, odd = tl.min(seen, axis=1), tl.max(seen, axis=1), nan_unless_finite(seen, 1)
    if BLOCK_B > 0:
        b, c_b, mask_b = load_columns(x_ptr, m, in_m, C, stride_x, BLOCK_A, BLOCK_B, WHOLE)
        seen_b, channel_b = divided(b, c_b, C, channel_scale_ptr)
        low, high = tl.minimum(low, tl.min(seen_b, axis=1)), tl.maximum(high, tl.max(seen_b, axis=1))
        odd += nan_unless_finite(seen_b, 1)
    scale, zero = grid_of(low, high, TOP, HALF, SYMMETRIC)
    scale += odd
    store_tokens(codes_ptr, m, c_a, mask_a, a, scale, zero, channel_a, channel_scale_ptr, C, TOP, HALF, FUSED)
    if BLOCK_B > 0:
        store_tokens(codes_ptr, m, c_b, mask_b, b, scale, zero, channel_b, channel_scale_ptr, C, TOP, HALF, FUSED)
    tl.store(scale_ptr + m, scale, mask=in_m)
    tl.store(zero_ptr + m, zero.to(tl.int32) - HALF, mask=in_m)


@triton.jit
def per_long_token_kernel(
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
    FUSED: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One row that does not fit in registers: its range, then its codes."""
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
        codes = code_of(x, divisor, inverse_of(divisor), zero, TOP, HALF, FUSED)
        tl.store(codes_ptr + m * C + c, codes, mask=c < C)
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
    FUSED: tl.constexpr,
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
    codes = code_of(x, divisor, inverse_of(divisor), zero, TOP, HALF, FUSED)
    tl.store(codes_ptr + sample * n + i, codes, mask=i < n)
    if tl.program_id(1) == 0:
        tl.store(scale_ptr + sample, scale)
        tl.store(zero_ptr + sample, zero.to(tl.int32) - HALF)


def launch_by_table(
    x: Tensor, scale: Tensor, zero_point: Tensor, index: Tensor | None, divisor: Tensor | None, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Run `by_table_flat_kernel`, or `by_table_kernel` where channels have divisors or rows lie apart."""
    rows = row_view(x)
    m, columns = rows.shape
    runs = 1 if index is None else index.numel()
    codes, run_scale, run_zero = empty_quantized(x, runs)
    scale, zero_point = scale.float().contiguous(), zero_point.float().contiguous()
    grids = (scale, zero_point, index)
    constants = {"TOP": 2**bits - 1, "HALF": 2 ** (bits - 1), "FUSED": fuses(), "num_warps": 4}
    if divisor is None and rows.is_contiguous():
        n = rows.numel() // runs
        by_table_flat_kernel[(runs, max(1, triton.cdiv(n, BLOCK)))](
            rows, *grids, codes, run_scale, run_zero, n, **constants, BLOCK=BLOCK, enable_fp_fusion=False
        )
        return codes, run_scale, run_zero
    block_c = channel_block(columns)
    block_m = BLOCK // block_c
    grid = (runs, max(1, triton.cdiv(m // runs, block_m)), max(1, triton.cdiv(columns, block_c)))
    by_table_kernel[grid](
        rows, *grids, None if divisor is None else divisor.contiguous(), codes, run_scale, run_zero,
        columns, m // runs, rows.stride(0), **constants, BLOCK_M=block_m, BLOCK_C=block_c, enable_fp_fusion=False,
    )  # fmt: skip
    return codes, run_scale, run_zero


def fuses() -> bool:
    """Whether tl.fma rounds once, as a GPU's does; the interpreter's rounds twice."""
    return not triton.knobs.runtime.interpret


def channel_block(channels: int) -> int:
    """Return a power of two of channels that a tile takes: one that divides them if it is not a short one."""
    exact = channels & -channels
    return min(exact if exact >= 64 else triton.next_power_of_2(max(channels, 1)), 512)


def launch_dynamic(
    x: Tensor, runs: int, bits: int, symmetric: bool, channel: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Run `per_token_kernel`, or the two kernels of samples."""
    codes, scale, zero = empty_quantized(x, runs)
    channel = None if channel is None else channel.contiguous()
    top, half = 2**bits - 1, 2 ** (bits - 1)
    rows = row_view(x)
    constants = {"TOP": top, "HALF": half, "SYMMETRIC": symmetric, "FUSED": fuses()}
    if runs == rows.shape[0] and rows.shape[1] > TOKEN_BLOCK:
        per_long_token_kernel[(runs,)](
            rows, channel, codes, scale, zero, rows.shape[1], rows.stride(0),
            **constants, BLOCK_C=TOKEN_BLOCK // 4, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
        return codes, scale, zero
    if runs == rows.shape[0]:
        blocks = token_blocks(rows.shape[1])
        per_token_kernel[(triton.cdiv(runs, blocks.rows),)](
            rows, channel, codes, scale, zero, runs, rows.shape[1], rows.stride(0),
            **constants, **blocks.constants, enable_fp_fusion=False,
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
        **constants, CHUNKS=triton.next_power_of_2(chunks), BLOCK_N=SAMPLE_BLOCK, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return codes, scale, zero


@dataclass(frozen=True, slots=True)
class TokenBlocks:
    """How a program keeps `rows` whole rows in registers: two blocks of columns, the second of which may be empty."""

    rows: int
    first: int
    second: int
    warps: int
    is_whole: bool

    @property
    def constants(self) -> dict[str, int]:
        """What the kernels are compiled with."""
        return {
            "ROWS": self.rows, "BLOCK_A": self.first, "BLOCK_B": self.second, "WHOLE": self.is_whole,
            "num_warps": self.warps,
        }  # fmt: skip


def token_blocks(channels: int) -> TokenBlocks:
    """Return how rows of so many channels are kept in registers.

    Blocks are powers of two. One alone would leave up to half of its values unused; with a second, the sizes of usual
    models (640, 1152, 1280, 5120) are met exactly. A thread has some 40 values. One warp has a row to itself if it can:
    sums across warps go through shared memory, and wait for all of them.
    """
    first = 1 << (channels.bit_length() - 1)
    rest = channels - first
    second = triton.next_power_of_2(rest) if rest else 0
    if first < 32 or second == first:
        first, second = triton.next_power_of_2(channels), 0
    columns = first + second
    warps = next((warps for warps in (1, 2, 4, 8) if columns <= TOKEN_WARP * warps), 16)
    rows = 1 << (max(1, TOKEN_WARP // columns).bit_length() - 1)
    return TokenBlocks(rows, first, second, warps, columns == channels)


def row_view(x: Tensor) -> Tensor:
    """View (..., C) as (M, C) with contiguous rows, or copy it so."""
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.numel() == 0 else rows.contiguous()


def empty_quantized(x: Tensor, runs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate codes, scales and zero points."""
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(runs, dtype=torch.float32, device=x.device)
    return codes, scale, torch.empty(runs, dtype=torch.int32, device=x.device)
