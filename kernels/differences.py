"""Activations quantized as differences to what is held, in closed loop.

    code = the grid's for x - held,         held <- held + (code - zero_point) * scale * restore

Nothing is held before the first codes; then they are those of x itself. Every product and sum is rounded to float32 in
this order, by whatever backend, so that what is held is the same bit for bit wherever the same x is read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.errors import KernelError


@dataclass(frozen=True, slots=True)
class Held:
    """What codes are taken from and added to.

    Attributes
    ----------
    values : Tensor, shape of the input (..., C), dtype float32
        Contiguous; written to.
    scale : Tensor, shape (1,), or (R,) if nothing is held yet, dtype float32
        Of the codes, of each of R equal runs of rows.
    restore : Tensor, shape (C,), dtype float32, or None
        What channels were divided by beside the scale.
    is_first : bool
        `values` have no values yet.
    """

    values: Tensor
    scale: Tensor
    restore: Tensor | None = None
    is_first: bool = False

    def check(self, x: Tensor) -> None:
        """Raise KernelError unless this can be held of `x`."""
        values, restore = self.values, self.restore
        fits = values.shape == x.shape and values.is_contiguous() and values.dtype is torch.float32
        if (
            not fits
            or (self.scale.numel() != 1 and not self.is_first)
            or (restore is not None and restore.shape != x.shape[-1:])
        ):
            raise KernelError(
                f"held: got {values.dtype} of shape {tuple(values.shape)} with {self.scale.numel()} scales, wanted "
                f"contiguous float32 of shape {tuple(x.shape)} with one"
            )

    def difference(self, x: Tensor) -> Tensor:
        """Return what is to be quantized of `x`, float32."""
        return x.float() if self.is_first else x.float() - self.values

    def add(self, codes: Tensor, zero_point: Tensor) -> None:
        """Add what codes, shape as `values`, stand for; `zero_point`, shape (1,), is in the codes' domain."""
        value = held_value(codes, zero_point, self.scale, self.restore)
        if self.is_first:
            self.values.copy_(value)
        else:
            self.values.add_(value)


def held_value(codes: Tensor, zero_point: Tensor, scale: Tensor, restore: Tensor | None) -> Tensor:
    """Return (code - zero_point) * scale * restore, float32."""
    value = codes.float().sub_(zero_point.float()).mul_(scale)
    return value if restore is None else value.mul_(restore)
