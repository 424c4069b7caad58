"""What several kernels share: rounding, the code of a value, unpacking, the float epilogue."""

from __future__ import annotations

import triton
import triton.language as tl

# 1.5 * 2**23: added to |x| < 2**22 it leaves no bits for a fraction, and a whole number in the lowest bits.
_ROUNDING = tl.constexpr(12582912.0)


@triton.jit
def round_half_even(x):
    """Round |x| < 2**22 to whole numbers, ties to even."""
    return (x + _ROUNDING) - _ROUNDING


@triton.jit
def inverse_of(scale):
    """Round 1 / scale, which `divide` takes."""
    return tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)


@triton.jit
def divide(x, by, inverse, FUSED: tl.constexpr):
    """Round x / by to nearest, for quotients below 2**17; `inverse` is `inverse_of(by)`.

    A division is a dozen instructions with a branch. From a quotient that is off by one unit in its last place and a
    rounded inverse, two fused multiply-adds make the rounded quotient (Markstein 1990). Where multiply-adds are not
    fused, x is divided.
    """
    if FUSED:
        near = x * inverse
        quotient = tl.fma(tl.fma(-near, by, x), inverse, near)
    else:
        quotient = tl.div_rn(x, by)
    return quotient


@triton.jit
def clamped(x, low, high):
    """Clamp x; NaN gives `low`."""
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def code_of(x, scale, inverse, zero, TOP: tl.constexpr, HALF: tl.constexpr, FUSED: tl.constexpr):
    """Signed code clamp(round(x / scale) + zero, 0, TOP) - HALF; `zero` is the unsigned zero point, in float32.

    It is x that is clamped, to a quarter of a step beyond the first and last code: minima, maxima and conversions to
    integers take the most time of all instructions here. The sum with `_ROUNDING` has the rounded quotient in its
    lowest bits. What an infinite scale divides has the zero point's code.
    """
    finite = scale < float("inf")
    by = tl.where(finite, scale, 1.0)
    low, high = tl.where(finite, (-0.25 - zero) * by, 0.0), tl.where(finite, (TOP + 0.25 - zero) * by, 0.0)
    steps = divide(clamped(x, low, high), by, inverse, FUSED)
    shift = zero.to(tl.int32) - HALF
    return ((steps + _ROUNDING).to(tl.int32, bitcast=True) + shift).to(tl.int8)


@triton.jit
def code_near(steps, zero, TOP: tl.constexpr, HALF: tl.constexpr):
    """As `code_of`, for a quotient that was rounded before: `steps` is what was divided, times the inverse."""
    steps = clamped(steps, -0.25 - zero, TOP + 0.25 - zero)
    return ((steps + _ROUNDING).to(tl.int32, bitcast=True) + (zero.to(tl.int32) - HALF)).to(tl.int8)


@triton.jit
def grid_of(low, high, TOP: tl.constexpr, HALF: tl.constexpr, SYMMETRIC: tl.constexpr):
    """Scale and unsigned zero point of min-max range [low, high]: kernels.activations.minmax_grid."""
    low = tl.minimum(low, 0.0)
    high = tl.maximum(high, 0.0)
    if SYMMETRIC:
        scale = tl.maximum(tl.div_rn(tl.maximum(-low, high), tl.full(low.shape, TOP // 2, tl.float32)), 1e-8)
        zero = tl.full(low.shape, HALF, tl.float32)
    else:
        scale = tl.maximum(tl.div_rn(high - low, tl.full(low.shape, TOP, tl.float32)), 1e-8)
        zero = tl.minimum(tl.maximum(round_half_even(tl.div_rn(-low, scale)), 0.0), TOP)
    return scale, zero


@triton.jit
def nan_unless_finite(x, AXIS: tl.constexpr = 0):
    """0.0, or NaN if a value of `x` is infinite or NaN, which minima and maxima drop: added to a scale, it shows."""
    return tl.sum(x - x, axis=AXIS)


@triton.jit
def lane_of(packed, lane: tl.constexpr, BITS: tl.constexpr):
    """Codes of one run of a block of packed bytes, int8."""
    codes = packed
    if BITS < 8:
        codes = ((packed >> (lane * BITS)) & ((1 << BITS) - 1)).to(tl.int8)
    return codes


@triton.jit
def factor_of(factor_ptr, group, n, in_n, N):
    """Return a group's multipliers of rows `n`, and what zero points add to products, -128 to 0, both int32."""
    factor = tl.load(factor_ptr + group * N + n, mask=in_n, other=0).to(tl.int32)
    return factor & 255, ((factor >> 8) & 255) - 128


@triton.jit
def tile_of(pid, tiles_m, tiles_n, SWIZZLE: tl.constexpr):
    """Tile of a program: SWIZZLE rows of tiles walk the columns together, so that weights stay in the L2 cache."""
    width = SWIZZLE * tiles_n
    first = (pid // width) * SWIZZLE
    height = tl.minimum(tiles_m - first, SWIZZLE)
    return first + (pid % width) % height, (pid % width) // height


@triton.jit
def finish_tile(
    acc,
    m,
    column,
    mask,
    bias_ptr,
    residual_ptr,
    down_ptr,
    up_ptr,
    out_ptr,
    stride_residual,
    stride_out,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    gate_ptr=None,
    rows_per_gate=1,
    stride_gate=0,
):
    """Add bias and low-rank branch to float32 `acc`, multiply by a gate, add a residual and store it.

    `m` is int64, `column` int32; a gate has a row for each `rows_per_gate` rows.
    """
    live = tl.max(mask.to(tl.int32), axis=0) > 0
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + column, mask=live, other=0.0).to(tl.float32)[None, :]
    if RANK > 0:
        rows = tl.max(mask.to(tl.int32), axis=1) > 0
        for r0 in range(0, RANK, BLOCK_R):
            r = r0 + tl.arange(0, BLOCK_R)
            down = tl.load(
                (down_ptr + m * RANK)[:, None] + r[None, :], mask=rows[:, None] & (r[None, :] < RANK), other=0.0
            )
            up = tl.load(
                (up_ptr + column * RANK)[None, :] + r[:, None], mask=live[None, :] & (r[:, None] < RANK), other=0.0
            )
            acc = tl.dot(down, up, acc, input_precision="ieee")
    if gate_ptr is not None:
        gate = gate_ptr + (m // rows_per_gate * stride_gate)[:, None] + column[None, :]
        acc *= tl.load(gate, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        acc += tl.load((residual_ptr + m * stride_residual)[:, None] + column[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
    tl.store((out_ptr + m * stride_out)[:, None] + column[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_columns(x_ptr, m, in_m, C, stride_x, FIRST: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """Load BLOCK columns of rows `m`, from FIRST on, as float32; return their numbers too, and which there are.

    WHOLE: all of these columns are within the rows.
    """
    c = FIRST + tl.arange(0, BLOCK)
    mask = tl.broadcast_to(in_m[:, None], (m.shape[0], BLOCK)) if WHOLE else in_m[:, None] & (c < C)[None, :]
    return tl.load(x_ptr + m[:, None] * stride_x + c[None, :], mask=mask, other=0.0).to(tl.float32), c, mask
