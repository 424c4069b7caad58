from __future__ import annotations

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor
from torch.nn import functional as F

from kernels.errors import KernelError
from kernels.rotary import HeadedTokens, rms_norm_rotary
from tests.kernels.test_norms import BACKENDS, noise


def angles(tokens: int, size: int) -> tuple[Tensor, Tensor]:
    angle = noise(tokens, size) * 3
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "heads", "size"), [((5,), 3, 16), ((3, 7), 24, 128), ((1, 2), 1, 6)])
def test_heads_are_normalized_and_rotated(
    tokens: tuple[int, ...], heads: int, size: int, dtype: torch.dtype, device: str
) -> None:
    parts = [HeadedTokens(noise(2, each, heads, size).to(dtype) * 2, noise(size).to(dtype), 1e-6) for each in tokens]
    parts[0] = HeadedTokens(parts[0].x, None, 1e-3)
    cos, sin = angles(sum(tokens), size)
    normed = torch.cat([F.rms_norm(part.x, (size,), part.weight, part.eps) for part in parts], dim=1)
    want = apply_rotary_emb(normed, (cos, sin), sequence_dim=1)
    there = [
        HeadedTokens(part.x.to(device), None if part.weight is None else part.weight.to(device), part.eps)
        for part in parts
    ]
    for backend in BACKENDS:
        got = rms_norm_rotary(there, cos.to(device), sin.to(device), backend=backend)
        assert got.dtype is dtype
        # A norm that rounds to the other side is a step of the dtype away.
        step = torch.finfo(dtype).eps
        assert float((got.cpu().float() - want.float()).abs().max()) <= 4 * step * float(want.float().abs().max())
        if dtype is torch.float16 or device == "cuda":  # the interpreter cuts to bfloat16 and does not round
            assert float((got.cpu() != want).float().mean()) <= (0.5 if dtype is torch.float32 else 0.01)


def test_heads_may_lie_apart(device: str) -> None:
    wide = noise(2, 4, 3, 24).to(device)
    cos, sin = (each.to(device) for each in angles(4, 16))
    apart, together = wide[..., :16], wide[..., :16].contiguous()
    want, got = (rms_norm_rotary([HeadedTokens(x, None, 1e-6)], cos, sin, backend="triton") for x in (together, apart))
    assert torch.equal(want, got)


def test_what_does_not_fit_is_refused() -> None:
    x = noise(1, 2, 3, 8)
    cos, sin = angles(2, 8)
    with pytest.raises(KernelError, match=r"got cosines \(3, 8\)"):
        rms_norm_rotary([HeadedTokens(x, None, 1e-6)], noise(3, 8), sin)
    with pytest.raises(KernelError, match=r"wanted torch.float32 \(1, S, 3, 8\)"):
        rms_norm_rotary([HeadedTokens(x, None, 1e-6), HeadedTokens(noise(1, 2, 4, 8), None, 1e-6)], cos, sin)
    with pytest.raises(KernelError, match="even"):
        rms_norm_rotary([HeadedTokens(noise(1, 2, 3, 7), None, 1e-6)], *angles(2, 7))
