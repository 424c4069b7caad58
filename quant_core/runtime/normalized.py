"""Layer norms that the layers behind them compute, where these quantize their input.

A transformer block normalizes, modulates (norm(x) * (1 + scale) + shift) and quantizes: apart, that reads its tokens
four times and writes them four times. Here a norm gives a tensor that is not computed yet (`Normalized`), which takes
up the modulation that diffusers' block applies to it. A `RuntimeLayer` that can makes its codes of what was to be
normalized (`kernels.norms`), in one kernel; for whatever else reads it, it is computed as the norm would have been. So
blocks and attentions stay diffusers' own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kernels.backend import is_traced
from kernels.norms import MAX_TOKEN, LayerNorm
from quant_core.runtime.lazy import LazyTensor


class Normalized(LazyTensor):
    """What a LayerNorm gives, times `multiplier` and plus `shift` where there are, computed when it is read.

    Attributes
    ----------
    source : Tensor, shape (B, T, C), floating dtype
        What is normalized. Whoever writes to it before this is read changes this.
    module : LayerNorm
    multiplier, shift : Tensor, shape (B, 1, C), dtype of `source`, or None
    """

    source: Tensor
    module: nn.LayerNorm
    multiplier: Tensor | None
    shift: Tensor | None
    _value: Tensor | None

    @staticmethod
    def __new__(
        cls, source: Tensor, module: nn.LayerNorm, multiplier: Tensor | None = None, shift: Tensor | None = None
    ) -> Normalized:
        made: Normalized = Tensor._make_wrapper_subclass(cls, source.shape, dtype=source.dtype, device=source.device)
        made.source, made.module, made.multiplier, made.shift, made._value = source, module, multiplier, shift, None
        return made

    @property
    def is_whole(self) -> bool:
        """Whether it is modulated by both terms or none, which is what kernels compute."""
        return (self.multiplier is None) == (self.shift is None)

    def layer_norm(self) -> LayerNorm:
        """Return it as the kernels take it."""
        modulation = (None if each is None else each[:, 0] for each in (self.multiplier, self.shift))
        return LayerNorm(self.module.eps, self.module.weight, self.module.bias, *modulation)

    def value(self) -> Tensor:
        """Compute it with PyTorch's operators, as it would have been without this class; once."""
        if self._value is None:
            y = nn.LayerNorm.forward(self.module, self.source)
            y = y if self.multiplier is None else y * self.multiplier
            self._value = y if self.shift is None else y + self.shift
        return self._value

    def taking(self, function: Any, other: Any, *, is_first: bool) -> Normalized | None:
        """Take up a modulation's product, then its sum."""
        if not self.goes_with(other) or other.shape != (self.shape[0], 1, self.shape[2]) or self.shift is not None:
            return None
        if function is torch.ops.aten.mul.Tensor and self.multiplier is None:
            return Normalized(self.source, self.module, other)
        if function is torch.ops.aten.add.Tensor and self.multiplier is not None:
            return Normalized(self.source, self.module, self.multiplier, other)
        return None


class LayerNormBehind(nn.LayerNorm):
    """A LayerNorm whose output is computed where it is read: by the layers behind it, which `fuse_blocks` has seen to.

    Parameters
    ----------
    norm : LayerNorm
        Its parameters are taken over.
    """

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__(norm.normalized_shape, norm.eps, elementwise_affine=False)
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (B, T, C), later where that can be; at once where kernels are traced or gradients are wanted."""
        waits = x.dim() == 3 and 0 < x.shape[-1] <= MAX_TOKEN and x.numel() > 0 and x.is_floating_point()
        is_plain = type(x) is Tensor and not is_traced(x) and not torch.is_autocast_enabled(x.device.type)
        if not waits or not is_plain or (torch.is_grad_enabled() and x.requires_grad):
            return super().forward(x)
        return Normalized(x, self)
