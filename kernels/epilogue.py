"""What follows the integer sum of a layer: bias, a low-rank branch, a gate, a residual, in float32; then a dtype."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

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
    """What is done to a layer's scaled sum, in this order: bias, low-rank branch, gate, residual.

    Attributes
    ----------
    dtype : torch.dtype
        Of the output: float32, float16 or bfloat16.
    bias : Tensor, shape (N,), or None
    residual : Tensor, shape of the output, or None
        Added in float32, so that the output is rounded once.
    low_rank : LowRank or None
    gate : Tensor, shape (B, N), or None
        Of a Linear: multiplies what there is by then, each of B equal runs of rows with its own, before the residual.
    """

    dtype: torch.dtype = torch.float32
    bias: Tensor | None = None
    residual: Tensor | None = None
    low_rank: LowRank | None = None
    gate: Tensor | None = None

    def check(self, shape: tuple[int, ...], *, gated: bool = False) -> None:
        """Raise KernelError unless the terms fit an output of `shape` (..., N), of an operator that may be `gated`."""
        if self.dtype not in OUTPUT_DTYPES:
            raise KernelError(f"output dtype: got {self.dtype}, wanted one of {', '.join(map(str, OUTPUT_DTYPES))}")
        if self.bias is not None and self.bias.shape != shape[-1:]:
            raise KernelError(f"bias: got shape {tuple(self.bias.shape)}, wanted {shape[-1:]}")
        if self.residual is not None and self.residual.shape != shape:
            raise KernelError(f"residual: got shape {tuple(self.residual.shape)}, wanted {shape}")
        if self.gate is not None:
            runs = self.gate.shape[0] if self.gate.dim() == 2 and gated else 0
            if not runs or math.prod(shape[:-1]) % runs or self.gate.shape[1] != shape[-1]:
                wanted = f"(B, {shape[-1]}), B dividing rows" if gated else "none in this operator"
                raise KernelError(f"gate: got shape {tuple(self.gate.shape)}, wanted {wanted}")
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
    gate: Tensor | None = None

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
    if rows.gate is not None:
        value = value * _gate_rows(rows.gate, len(value))
    if rows.residual is not None:
        value = value + rows.residual.float()
    return value.to(dtype)


def without_gate(rows: EpilogueRows) -> EpilogueRows:
    """Return what a kernel that has no gate may compute: what comes before it."""
    return replace(rows, gate=None, residual=None)


def add_gated(value: Tensor, rows: EpilogueRows, dtype: torch.dtype) -> Tensor:
    """Multiply what a kernel without a gate gave, (M, N), with it, and add the residual: one pass over memory."""
    assert rows.gate is not None
    runs, gate = value.view(len(rows.gate), -1, value.shape[1]), rows.gate[:, None]
    if rows.residual is None:
        out = runs * gate
    else:
        out = torch.addcmul(rows.residual.reshape(runs.shape).to(value.dtype), runs, gate.to(value.dtype))
    return out.view(value.shape).to(dtype)


def _gate_rows(gate: Tensor, rows: int) -> Tensor:
    """Repeat a gate's runs for every row, in float32."""
    return gate.float().repeat_interleave(rows // len(gate), dim=0, output_size=rows)
