"""What follows the integer sum of a layer: bias, a low-rank branch, a residual, in float32, then the output's dtype."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.errors import KernelError

OUTPUT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class LowRank:
    """A branch up @ (down @ x) beside the quantized weight.

    Attributes
    ----------
    hidden : Tensor, shape (..., rank)
        down @ x, which the caller computes from the unquantized input; rows as the output's.
    up : Tensor, shape (N, rank), dtype as `hidden`
    """

    hidden: Tensor
    up: Tensor


@dataclass(frozen=True, slots=True)
class Epilogue:
    """Terms added to a layer's scaled sum, in this order: bias, low-rank branch, residual.

    Attributes
    ----------
    dtype : torch.dtype
        Of the output: float32, float16 or bfloat16.
    bias : Tensor, shape (N,), or None
    residual : Tensor, shape of the output, or None
        Added in float32, so that the output is rounded once.
    low_rank : LowRank or None
    """

    dtype: torch.dtype = torch.float32
    bias: Tensor | None = None
    residual: Tensor | None = None
    low_rank: LowRank | None = None

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise KernelError unless the terms fit an output of `shape` (..., N)."""
        if self.dtype not in OUTPUT_DTYPES:
            raise KernelError(f"output dtype: got {self.dtype}, wanted one of {', '.join(map(str, OUTPUT_DTYPES))}")
        if self.bias is not None and self.bias.shape != shape[-1:]:
            raise KernelError(f"bias: got shape {tuple(self.bias.shape)}, wanted {shape[-1:]}")
        if self.residual is not None and self.residual.shape != shape:
            raise KernelError(f"residual: got shape {tuple(self.residual.shape)}, wanted {shape}")
        if self.low_rank is not None:
            hidden, up = self.low_rank.hidden, self.low_rank.up
            if hidden.shape[:-1] != shape[:-1] or up.shape != (shape[-1], hidden.shape[-1]) or hidden.dtype != up.dtype:
                raise KernelError(
                    f"low-rank branch: got {tuple(hidden.shape)} {hidden.dtype} and {tuple(up.shape)} {up.dtype}, "
                    f"wanted {(*shape[:-1], 'rank')} and {(shape[-1], 'rank')} of one dtype"
                )


@dataclass(frozen=True, slots=True)
class EpilogueRows:
    """An epilogue's tensors as rows (M, ...), as kernels take them: the optional ones may be absent."""

    bias: Tensor | None
    residual: Tensor | None
    down: Tensor | None
    up: Tensor | None

    @property
    def rank(self) -> int:
        """Rank of the low-rank branch; 0 without one."""
        return 0 if self.up is None else self.up.shape[1]


def add_epilogue(value: Tensor, rows: EpilogueRows, dtype: torch.dtype) -> Tensor:
    """Add the terms to float32 `value`, shape (M, N): the reference of every kernel's epilogue."""
    if rows.bias is not None:
        value = value + rows.bias.float()
    if rows.down is not None and rows.up is not None:
        value = value + rows.down.float() @ rows.up.float().t()
    if rows.residual is not None:
        value = value + rows.residual.float()
    return value.to(dtype)
