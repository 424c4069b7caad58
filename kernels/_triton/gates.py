"""Triton twin of `kernels.gates`; quotients are products with inverses, as in `kernels._triton.norms`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._triton.activations import (
    BLOCK,
    channel_block,
    divisors,
    fuses,
    row_view,
    tile_of_run,
    token_blocks,
    write_grids,
)
from kernels._triton.common import code_near, inverse_of, load_columns, nan_unless_finite
from kernels._triton.fp8 import check_hardware, near_e4m3
from kernels.fp8 import FP8, FP8_MAX, SCALE_FLOOR


@triton.jit
def gelu(x, TANH: tl.constexpr):
    """GELU in float32, or its approximation by tanh."""
    if TANH:
        # (1 + tanh(u)) / 2 = 1 / (1 + e**-2u), with u = sqrt(2 / pi) (x + 0.044715 x**3); here as a power of 2.
        power = -x * (2.302208198144325 + 0.1029432395800235 * (x * x))
        x = x / (1.0 + tl.exp2(tl.minimum(power, 100.0)))
    else:
        x = x * (0.5 + 0.5 * tl.erf(x * 0.7071067811865476))
    return x


@triton.jit
def gated_columns(
    x_ptr, m, in_m, C, stride_x, FIRST: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr, GATED: tl.constexpr,
    TANH: tl.constexpr,
):  # fmt: skip
    """Load BLOCK columns of rows as `load_columns`, with the activation applied; 0 beyond the row."""
    x, c, mask = load_columns(x_ptr, m, in_m, C, stride_x, FIRST, BLOCK, WHOLE)
    if GATED:
        gating, _, _ = load_columns(x_ptr + C, m, in_m, C, stride_x, FIRST, BLOCK, WHOLE)
        x *= gelu(gating, TANH)
    else:
        x = gelu(x, TANH)
    return x, c, mask


@triton.jit
def gate_fp8_kernel(
    x_ptr,  # (M, C), or (M, 2 C) of GATED
    values_ptr,  # (M, C) float8e4nv
    scale_ptr,  # (M,)
    M,
    C,
    stride_x,
    GATED: tl.constexpr,
    TANH: tl.constexpr,
    MAX: tl.constexpr,
    FLOOR: tl.constexpr,
    FUSED: tl.constexpr,
    WHOLE: tl.constexpr,  # whether the blocks have no more columns than the rows
    ROWS: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Some rows, each read once: the activation's largest magnitudes, then its numbers; as of quantize_fp8_kernel."""
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_m = m < M
    a, c_a, mask_a = gated_columns(x_ptr, m, in_m, C, stride_x, 0, BLOCK_A, WHOLE, GATED, TANH)
    top, odd = tl.max(tl.abs(a), axis=1), nan_unless_finite(a, 1)
    if BLOCK_B > 0:
        b, c_b, mask_b = gated_columns(x_ptr, m, in_m, C, stride_x, BLOCK_A, BLOCK_B, WHOLE, GATED, TANH)
        top = tl.maximum(top, tl.max(tl.abs(b), axis=1))
        odd += nan_unless_finite(b, 1)
    scale = tl.maximum(tl.div_rn(top, tl.full(top.shape, MAX, tl.float32)), FLOOR) + odd
    inverse = inverse_of(scale)[:, None]
    out = values_ptr + m[:, None] * C
    values = near_e4m3(a * inverse, MAX, FUSED)
    tl.store(out + c_a[None, :], values.to(values_ptr.dtype.element_ty), mask=mask_a)
    if BLOCK_B > 0:
        values_b = near_e4m3(b * inverse, MAX, FUSED)
        tl.store(out + c_b[None, :], values_b.to(values_ptr.dtype.element_ty), mask=mask_b)
    tl.store(scale_ptr + m, scale, mask=in_m)


@triton.jit
def gate_quantize_kernel(
    x_ptr,  # (M, C), or (M, 2 C) of GATED
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
    GATED: tl.constexpr,
    TANH: tl.constexpr,
    TOP: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Codes of one tile of the rows of a run."""
    run = tl.program_id(0)
    step, scale, zero = write_grids(scale_ptr, zero_ptr, index_ptr, run_scale_ptr, run_zero_ptr, run, HALF)
    m, c, mask = tile_of_run(run, rows_per_run, C, BLOCK_M, BLOCK_C)
    divisor = divisors(divisor_ptr, step, scale, c, C)
    at = x_ptr + m[:, None] * stride_x + c[None, :]
    x = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    if GATED:
        x *= gelu(tl.load(at + C, mask=mask, other=0.0).to(tl.float32), TANH)
    else:
        x = gelu(x, TANH)
    codes = code_near(x * inverse_of(divisor)[None, :], zero, TOP, HALF)
    tl.store(codes_ptr + m[:, None] * C + c[None, :], codes, mask=mask)


def launch_gate(
    x: Tensor, gate: str, scale: Tensor, zero_point: Tensor, index: Tensor | None, divisor: Tensor | None, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Run `gate_quantize_kernel`."""
    is_gated = gate == "geglu"
    rows, columns = row_view(x), x.shape[-1] // (2 if is_gated else 1)
    m, runs = rows.shape[0], 1 if index is None else index.numel()
    codes = torch.empty(*x.shape[:-1], columns, dtype=torch.int8, device=x.device)
    run_scale = torch.empty(runs, dtype=torch.float32, device=x.device)
    run_zero = torch.empty(runs, dtype=torch.int32, device=x.device)
    block_c = channel_block(columns)
    block_m = BLOCK // block_c
    grid = (runs, max(1, triton.cdiv(m // runs, block_m)), max(1, triton.cdiv(columns, block_c)))
    gate_quantize_kernel[grid](
        rows, scale.float().contiguous(), zero_point.float().contiguous(), index,
        None if divisor is None else divisor.contiguous(), codes, run_scale, run_zero,
        columns, m // runs, rows.stride(0), GATED=is_gated, TANH=gate == "gelu-tanh",
        TOP=2**bits - 1, HALF=2 ** (bits - 1), BLOCK_M=block_m, BLOCK_C=block_c, num_warps=4,
        enable_fp_fusion=False,
    )  # fmt: skip
    return codes, run_scale, run_zero


def launch_gate_fp8(x: Tensor, gate: str) -> tuple[Tensor, Tensor]:
    """Run `gate_fp8_kernel`."""
    check_hardware(x)
    is_gated = gate == "geglu"
    rows, columns = row_view(x), x.shape[-1] // (2 if is_gated else 1)
    m, blocks = rows.shape[0], token_blocks(columns)
    values = torch.empty(*x.shape[:-1], columns, dtype=FP8, device=x.device)
    scale = torch.empty(m, dtype=torch.float32, device=x.device)
    gate_fp8_kernel[(triton.cdiv(m, blocks.rows),)](
        rows, values, scale, m, columns, rows.stride(0), GATED=is_gated, TANH=gate == "gelu-tanh", MAX=FP8_MAX,
        FLOOR=SCALE_FLOOR, FUSED=fuses(), **blocks.constants, enable_fp_fusion=False,
    )  # fmt: skip
    return values, scale
