"""Outputs of layers that are not multiplied yet, so that what a block does to them is part of the product.

A transformer block multiplies the output of its attention, and of its feed-forward, by a gate (one number a channel and
sample, of the timestep) and adds it to its input: apart, that reads the tokens five times and writes them three times.
Here such a layer gives a tensor that is not computed yet (`Deferred`), which takes up gate and sum, and then multiplies
with both in its epilogue (`kernels.epilogue`). Whatever else reads it gets what the layer would have given. So blocks
and attentions stay diffusers' own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quant_core.runtime.lazy import LazyTensor

if TYPE_CHECKING:
    from quant_core.runtime.layer import RuntimeLayer


class Deferred(LazyTensor):
    """What a layer gives for `source`, times `gate` where there is one, computed when it is read.

    Attributes
    ----------
    layer : RuntimeLayer
    source : Tensor, shape (B, T, C), floating dtype
        The layer's input. Whoever writes to it before this is read changes this.
    gate : Tensor, shape (B, 1, N), dtype of `source`, or None
    """

    layer: RuntimeLayer
    source: Tensor
    gate: Tensor | None
    _value: Tensor | None

    @staticmethod
    def __new__(cls, layer: RuntimeLayer, source: Tensor, gate: Tensor | None = None) -> Deferred:
        shape = (*source.shape[:-1], layer.shape[0])
        made: Deferred = Tensor._make_wrapper_subclass(cls, shape, dtype=source.dtype, device=source.device)
        made.layer, made.source, made.gate, made._value = layer, source, gate, None
        return made

    def value(self) -> Tensor:
        """Compute it, once."""
        if self._value is None:
            self._value = self.layer.multiply_now(self.source, None, self.gate)
        return self._value

    def taking(self, function: Any, other: Any, *, is_first: bool) -> Tensor | None:
        """Take up what a product's epilogue has: a gate, then a sum; and a division by 1."""
        if self._value is not None:
            return None
        if function is torch.ops.aten.div.Tensor and is_first and not isinstance(other, Tensor) and other == 1:
            return self
        if not self.goes_with(other):
            return None
        if function is torch.ops.aten.mul.Tensor and self.gate is None:
            is_gate = other.shape == (self.shape[0], 1, self.shape[2])
            return Deferred(self.layer, self.source, other) if is_gate else None
        if function is torch.ops.aten.add.Tensor and other.shape == self.shape:
            return self.layer.multiply_now(self.source, other, self.gate)
        return None
