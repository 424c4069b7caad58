"""Triton twin of `kernels.rotary`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.rotary import HeadedTokens

#: Values of one warp, in whole heads.
WARP_VALUES = 1024


@triton.jit
def rms_norm_rotary_kernel(
    x_ptr,  # (B, S, H, D), heads and their values one behind the other
    weight_ptr,  # (D,) or None
    cos_ptr,  # (all tokens, D) float32
    sin_ptr,
    out_ptr,  # (B, all tokens, H, D)
    tokens,
    first,
    H,
    stride_b,
    stride_s,
    eps,
    D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """All heads of one token, BLOCK_H at a time; pairs of neighbours lie in one thread."""
    image, token = tl.program_id(1).to(tl.int64), tl.program_id(0)
    d = tl.arange(0, BLOCK_D)
    in_d = d < D
    at = (first + token).to(tl.int64) * D + d
    cos_left, cos_right = pairs(tl.load(cos_ptr + at, mask=in_d, other=0.0)[None, :])
    sin_left, sin_right = pairs(tl.load(sin_ptr + at, mask=in_d, other=0.0)[None, :])
    weight = tl.full((BLOCK_D,), 1.0, tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + d, mask=in_d, other=0.0).to(tl.float32)
    row = x_ptr + image * stride_b + token.to(tl.int64) * stride_s
    out = out_ptr + ((image * tokens + first + token) * H) * D
    for h0 in range(0, H, BLOCK_H):
        h = h0 + tl.arange(0, BLOCK_H)
        mask = (h < H)[:, None] & in_d[None, :]
        place = h[:, None] * D + d[None, :]
        x = tl.load(row + place, mask=mask, other=0.0)
        wide = x.to(tl.float32)
        rstd = 1.0 / tl.sqrt_rn(tl.sum(wide * wide, axis=1) / D + eps)
        normed = (wide * rstd[:, None] * weight[None, :]).to(x.dtype).to(tl.float32)
        left, right = pairs(normed)
        turned = tl.join(left * cos_left - right * sin_left, right * cos_right + left * sin_right)
        tl.store(out + place, tl.reshape(turned, (BLOCK_H, BLOCK_D)).to(x.dtype), mask=mask)


@triton.jit
def pairs(x):
    """Split the columns of x into those of even and of odd numbers."""
    return tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))


def launch_rms_norm_rotary(parts: Sequence[HeadedTokens], cos: Tensor, sin: Tensor) -> Tensor:
    """Run the kernel once for each part."""
    batch, _, heads, size = parts[0].x.shape
    tokens = cos.shape[0]
    out = torch.empty(batch, tokens, heads, size, dtype=parts[0].x.dtype, device=parts[0].x.device)
    cos, sin = (each.to(out.device, torch.float32).contiguous() for each in (cos, sin))
    block_d = triton.next_power_of_2(size)
    block_h = min(triton.next_power_of_2(heads), max(1, WARP_VALUES // block_d))
    first = 0
    for part in parts:
        x = part.x if part.x.stride()[2:] == (size, 1) else part.x.contiguous()
        if x.numel():
            rms_norm_rotary_kernel[(x.shape[1], batch)](
                x, None if part.weight is None else part.weight.contiguous(), cos, sin, out,
                tokens, first, heads, x.stride(0), x.stride(1), part.eps,
                D=size, BLOCK_H=block_h, BLOCK_D=block_d, num_warps=1, enable_fp_fusion=False,
            )  # fmt: skip
        first += x.shape[1]
    return out
