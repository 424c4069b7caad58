"""RMSNorm of each head and rotary embedding of queries or keys, and tokens of several kinds put one behind the other.

Apart, that is six kernels that read and write each value in float32. Values are rounded to their dtype where the model
rounds them: after the norm, and in the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.backend import backend_for, is_traced
from kernels.errors import KernelError
from quant_spec.enums import KernelBackend


@dataclass(frozen=True, slots=True)
class HeadedTokens:
    """Queries or keys of one kind of tokens: `x`, shape (B, S, H, D), and the RMSNorm of each head.

    `weight` has shape (D,) or is None.
    """

    x: Tensor
    weight: Tensor | None
    eps: float


def rms_norm_rotary(
    parts: Sequence[HeadedTokens], cos: Tensor, sin: Tensor, *, backend: KernelBackend | str = KernelBackend.AUTO
) -> Tensor:
    """Normalize each head, put the tokens of all parts one behind the other, and rotate pairs of neighbours.

    Parameters
    ----------
    parts : sequence of HeadedTokens
        Of the same B, H, D and floating dtype; D is even.
    cos, sin : Tensor, shape (S, D), floating dtype
        S counts the tokens of all parts. Values 2 i and 2 i + 1 of a head become x cos - y sin and y cos + x sin, each
        with its own cosine and sine (Su et al. 2021, RoFormer; interleaved, as Flux has it).
    backend : KernelBackend

    Returns
    -------
    Tensor, shape (B, S, H, D), dtype of the parts

    Raises
    ------
    KernelError
        If shapes disagree.
    """
    first = parts[0].x
    tokens = sum(part.x.shape[1] for part in parts)
    size = first.shape[-1]
    for part in parts:
        alike = part.x.dim() == 4 and (part.x.shape[0], *part.x.shape[2:]) == (first.shape[0], *first.shape[2:])
        weight = None if part.weight is None else tuple(part.weight.shape)
        if not alike or part.x.dtype is not first.dtype or weight not in (None, (size,)):
            raise KernelError(
                f"rotary: got {part.x.dtype} {tuple(part.x.shape)} with a weight of {weight}, wanted {first.dtype} "
                f"({first.shape[0]}, S, {first.shape[2]}, {size}) with ({size},) or None"
            )
    if size % 2 or cos.shape != (tokens, size) or sin.shape != (tokens, size):
        raise KernelError(
            f"rotary: got cosines {tuple(cos.shape)} and sines {tuple(sin.shape)}, wanted ({tokens}, {size}), even"
        )
    # A compiler fuses the plain operators by itself.
    if not is_traced(first) and backend_for(first.device, backend) is KernelBackend.TRITON:
        from kernels._triton.rotary import launch_rms_norm_rotary

        with torch.cuda.device_of(first):
            return launch_rms_norm_rotary(parts, cos, sin)
    return rms_norm_rotary_reference(parts, cos, sin)


def rms_norm_rotary_reference(parts: Sequence[HeadedTokens], cos: Tensor, sin: Tensor) -> Tensor:
    """Do it with plain torch."""
    x = torch.cat([F.rms_norm(part.x, part.x.shape[-1:], part.weight, part.eps) for part in parts], dim=1)
    left, right = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((-right, left), dim=-1).flatten(-2)
    return (x.float() * cos[None, :, None] + turned.float() * sin[None, :, None]).to(x.dtype)
