"""Sums of activation codes, which weights with zero points ask for: of each row, and of what a kernel sees of an image.

An integer product with weights w - zero is sum x w - zero * sum x; the second sum is the same for all output channels.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.conv import ConvGeometry

ROW_BLOCK = 4096
PIXELS = 256


@triton.jit
def row_sums_kernel(
    x_ptr,  # (M, C) int8
    sums_ptr,  # (M,) int32
    M,
    C,
    stride_x,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums of some rows."""
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS,), dtype=tl.int32)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        x = tl.load(x_ptr + m[:, None] * stride_x + c[None, :], mask=(m < M)[:, None] & (c < C)[None, :], other=0)
        total += tl.sum(x.to(tl.int32), axis=1)
    tl.store(sums_ptr + m, total, mask=m < M)


@triton.jit
def window_sums_kernel(
    sums_ptr,  # (B, H, W) int32
    out_ptr,  # (B, H, W) int32
    M,
    H,
    W,
    TAPS_H: tl.constexpr,
    TAPS_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums of what a kernel of stride 1 sees around each pixel, with zeros beyond the image."""
    m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    image = m // (H * W) * (H * W)
    y = m % (H * W) // W
    x = m % W
    total = tl.zeros((BLOCK,), dtype=tl.int32)
    for tap in tl.static_range(TAPS_H * TAPS_W):
        row = y + (tap // TAPS_W - PAD_H)
        col = x + (tap % TAPS_W - PAD_W)
        inside = (m < M) & (row >= 0) & (row < H) & (col >= 0) & (col < W)
        total += tl.load(sums_ptr + image + row * W + col, mask=inside, other=0)
    tl.store(out_ptr + m, total, mask=m < M)


def row_sums(codes: Tensor) -> Tensor:
    """Add up the last dimension of int8 codes (..., C), rows of which are contiguous; returns int32 (...)."""
    shape = codes.shape[:-1]
    rows = codes.reshape(math.prod(shape), codes.shape[-1])
    m, columns = rows.shape
    sums = torch.empty(shape, dtype=torch.int32, device=codes.device)
    block = min(triton.next_power_of_2(max(columns, 1)), ROW_BLOCK)
    per_program = max(1, ROW_BLOCK // block)
    row_sums_kernel[(triton.cdiv(m, per_program),)](
        rows, sums, m, columns, rows.stride(0), ROWS=per_program, BLOCK_C=block, num_warps=4
    )
    return sums


def window_sums(sums: Tensor, geometry: ConvGeometry) -> Tensor:
    """Add up what each position of a kernel that keeps the image's size sees of (B, H, W) int32; the same shape."""
    out, (_, height, width) = torch.empty_like(sums), sums.shape
    window_sums_kernel[(triton.cdiv(sums.numel(), PIXELS),)](
        sums, out, sums.numel(), height, width, TAPS_H=geometry.kernel[0], TAPS_W=geometry.kernel[1],
        PAD_H=geometry.padding[0], PAD_W=geometry.padding[1], BLOCK=PIXELS, num_warps=4,
    )  # fmt: skip
    return out
