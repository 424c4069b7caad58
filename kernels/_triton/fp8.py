"""Triton twin of `kernels.fp8`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._triton.activations import TOKEN_BLOCK, fuses, row_view, token_blocks
from kernels._triton.blocks import architecture, fp8_blocks, rank_block
from kernels._triton.common import clamped, divide, finish_tile, inverse_of, load_columns, nan_unless_finite, tile_of
from kernels._triton.gemm import gate_strides, stride_of
from kernels._triton.tuned import HOPPER, LINEAR_FP8, Shape, Tile, tuned_tile
from kernels.epilogue import EpilogueRows
from kernels.errors import KernelError
from kernels.fp8 import FP8, FP8_MAX, SCALE_FLOOR, Fp8Matrix, why_no_fp8


@triton.jit
def round_e4m3(x):
    """Round |x| <= 448 to the nearest E4M3 number, ties to even, so that the conversion that follows is exact anywhere.

    Numbers in [2**e, 2**(e + 1)) are 2**(e - 3) apart, below 2**-6 they are 2**-9 apart: adding 1.5 * 2**(e + 20)
    leaves no bits for less.
    """
    power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    magic = tl.maximum(power, 0.015625) * 1572864.0
    rounded = (x + magic) - magic
    return tl.where(rounded == 0.0, x * 0.0, rounded)  # keeps the sign of zero


@triton.jit
def to_e4m3(x, by, inverse, MAX: tl.constexpr, FUSED: tl.constexpr):
    """x / by as a number that E4M3 has, or that the hardware's conversion rounds to one, which saturates."""
    x = divide(clamped(x, -(MAX + 1.0) * by, (MAX + 1.0) * by), by, inverse, FUSED)
    if not FUSED:
        x = round_e4m3(clamped(x, -MAX, MAX))
    return x


@triton.jit
def near_e4m3(x, MAX: tl.constexpr, FUSED: tl.constexpr):
    """As `to_e4m3`, of a quotient."""
    x = clamped(x, -MAX, MAX)
    return x if FUSED else round_e4m3(x)


@triton.jit
def quantize_fp8_kernel(
    x_ptr,  # (M, K)
    values_ptr,  # (M, K) float8e4nv
    scale_ptr,  # (M,)
    M,
    K,
    stride_x,
    MAX: tl.constexpr,
    FLOOR: tl.constexpr,
    FUSED: tl.constexpr,
    WHOLE: tl.constexpr,  # whether the blocks have no more columns than the rows
    ROWS: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Some rows, each read once: their largest magnitudes, then their numbers; blocks as of per_token_kernel."""
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_m = m < M
    a, k_a, mask_a = load_columns(x_ptr, m, in_m, K, stride_x, 0, BLOCK_A, WHOLE)
    top, odd = tl.max(tl.abs(a), axis=1), nan_unless_finite(a, 1)
    if BLOCK_B > 0:
        b, k_b, mask_b = load_columns(x_ptr, m, in_m, K, stride_x, BLOCK_A, BLOCK_B, WHOLE)
        top = tl.maximum(top, tl.max(tl.abs(b), axis=1))
        odd += nan_unless_finite(b, 1)
    scale = tl.maximum(tl.div_rn(top, tl.full(top.shape, MAX, tl.float32)), FLOOR) + odd
    inverse = inverse_of(scale)
    out = values_ptr + m[:, None] * K
    values = to_e4m3(a, scale[:, None], inverse[:, None], MAX, FUSED)
    tl.store(out + k_a[None, :], values.to(values_ptr.dtype.element_ty), mask=mask_a)
    if BLOCK_B > 0:
        values_b = to_e4m3(b, scale[:, None], inverse[:, None], MAX, FUSED)
        tl.store(out + k_b[None, :], values_b.to(values_ptr.dtype.element_ty), mask=mask_b)
    tl.store(scale_ptr + m, scale, mask=in_m)


@triton.jit
def quantize_long_fp8_kernel(
    x_ptr,  # (M, K)
    values_ptr,  # (M, K) float8e4nv
    scale_ptr,  # (M,)
    K,
    stride_x,
    MAX: tl.constexpr,
    FLOOR: tl.constexpr,
    FUSED: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One row that does not fit in registers: its largest magnitude, then its numbers."""
    m = tl.program_id(0).to(tl.int64)
    row = x_ptr + m * stride_x
    most = tl.zeros((BLOCK_K,), dtype=tl.float32)
    odd = tl.zeros((), dtype=tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        x = tl.load(row + k, mask=k < K, other=0.0).to(tl.float32)
        most = tl.maximum(most, tl.abs(x))
        odd += nan_unless_finite(x)
    top = tl.max(most, axis=0)
    scale = tl.maximum(tl.div_rn(top, tl.full(top.shape, MAX, tl.float32)), FLOOR) + odd
    inverse = inverse_of(scale)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        x = to_e4m3(tl.load(row + k, mask=k < K, other=0.0).to(tl.float32), scale, inverse, MAX, FUSED)
        tl.store(values_ptr + m * K + k, x.to(values_ptr.dtype.element_ty), mask=k < K)
    tl.store(scale_ptr + m, scale)


@triton.jit
def linear_fp8_kernel(
    x_ptr,  # (M, K) float8e4nv
    x_scale_ptr,  # (M,)
    w_ptr,  # (N, K) float8e4nv
    scale_ptr,  # (N,)
    bias_ptr,
    gate_ptr,  # (runs of rows_per_gate rows, N) or None
    residual_ptr,
    down_ptr,
    up_ptr,
    out_ptr,
    M,
    N,
    K,
    stride_x,
    stride_w,
    rows_per_gate,
    stride_gate,
    stride_residual,
    stride_out,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SWIZZLE: tl.constexpr,
):
    """One tile, summed in float32."""
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), SWIZZLE)
    m = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_m, in_n = m < M, n < N
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        x = tl.load((x_ptr + m * stride_x)[:, None] + k[None, :], mask=in_m[:, None] & (k[None, :] < K), other=0.0)
        w = tl.load(
            (w_ptr + n.to(tl.int64) * stride_w)[None, :] + k[:, None], mask=in_n[None, :] & (k[:, None] < K), other=0.0
        )
        acc = tl.dot(x, w, acc)
    acc *= tl.load(scale_ptr + n, mask=in_n, other=0.0)[None, :]
    acc *= tl.load(x_scale_ptr + m, mask=in_m, other=0.0)[:, None]
    finish_tile(
        acc, m, n, in_m[:, None] & in_n[None, :], bias_ptr, residual_ptr, down_ptr, up_ptr, out_ptr,
        stride_residual, stride_out, RANK, BLOCK_R, gate_ptr, rows_per_gate, stride_gate,
    )  # fmt: skip


def launch_quantize_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Run `quantize_fp8_kernel`, or its twin for long rows."""
    check_hardware(x)
    rows = row_view(x)
    values = torch.empty(x.shape, dtype=FP8, device=x.device)
    scale = torch.empty(rows.shape[0], dtype=torch.float32, device=x.device)
    m, columns = rows.shape
    constants = {"MAX": FP8_MAX, "FLOOR": SCALE_FLOOR, "FUSED": fuses()}
    if columns > TOKEN_BLOCK:
        quantize_long_fp8_kernel[(m,)](
            rows, values, scale, columns, rows.stride(0),
            **constants, BLOCK_K=TOKEN_BLOCK // 4, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
        return values, scale
    blocks = token_blocks(columns)
    quantize_fp8_kernel[(triton.cdiv(m, blocks.rows),)](
        rows, values, scale, m, columns, rows.stride(0), **constants, **blocks.constants, enable_fp_fusion=False
    )  # fmt: skip
    return values, scale


def launch_linear_fp8(
    x: Fp8Matrix, weight: Fp8Matrix, rows: EpilogueRows, dtype: torch.dtype, tile: Tile | None = None
) -> Tensor:
    """Run `linear_fp8_kernel`, with `tile` or what was measured on the device."""
    check_hardware(x.values)
    m, columns = x.values.shape
    n = weight.values.shape[0]
    out = torch.empty(m, n, dtype=dtype, device=x.values.device)
    if out.numel() == 0:
        return out
    tile = tile or tuned_tile(out.device, LINEAR_FP8, Shape(m, n, columns))
    if tile is not None and tile.kernel == HOPPER:
        from kernels._triton import hopper_launch as hopper

        if hopper.takes(x.values, weight.values, rows, n, dtype):
            hopper.linear_fp8(x, weight, rows, out, tile)
            return out
    blocks = fp8_blocks(architecture(out.device), m, n, tile=tile)
    linear_fp8_kernel[(triton.cdiv(m, blocks.m) * triton.cdiv(n, blocks.n),)](
        x.values, x.scale, weight.values, weight.scale, rows.bias, rows.gate, rows.residual, rows.down, rows.up, out,
        m, n, columns, x.values.stride(0), columns, *gate_strides(rows, m), stride_of(rows.residual), n,
        RANK=rows.rank, BLOCK_M=blocks.m, BLOCK_N=blocks.n, BLOCK_K=blocks.k, BLOCK_R=rank_block(rows.rank),
        SWIZZLE=blocks.swizzle, num_warps=blocks.warps, num_stages=blocks.stages, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def check_hardware(x: Tensor) -> None:
    """Refuse devices without E4M3."""
    if not triton.knobs.runtime.interpret and (reason := why_no_fp8(x.device)) is not None:
        raise KernelError(reason)
