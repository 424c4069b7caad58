"""Fake quantization with gradients: the straight-through estimator for the input, LSQ's gradient for the scale.

The forward is exactly `kernels.affine.fake_quantize_affine`, so that what is learned is what is deployed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.affine import fake_quantize_affine


class FakeQuantize(torch.autograd.Function):
    """x_hat = (clamp(round(x / s) + z, 0, top) - z) s.

    dx_hat/dx is 1 inside the range and 0 outside; dx_hat/ds is round(x / s) - x / s inside and code - z outside
    (Esser et al., "Learned Step Size Quantization", arXiv:1902.08153, Eq. 3). With a scale for each channel, x is
    divided by s * channel and multiplied by s: dx_hat/dx is 1 / channel inside the range.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, top: int | Tensor, channel: Tensor | None = None
    ) -> Tensor:
        """Return the dequantized codes, shape of `x`, float32; the others broadcast against `x`."""
        divisor = scale if channel is None else scale * channel
        ctx.save_for_backward(x, scale, zero_point)
        ctx.top, ctx.channel = torch.as_tensor(top, dtype=torch.float32, device=x.device), channel
        return fake_quantize_affine(x, divisor, zero_point, 0, top, output_scale=scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        """Return the gradients of `x` and `scale`."""
        (gradient,) = gradients
        x, scale, zero_point = ctx.saved_tensors
        steps = x / (scale if ctx.channel is None else scale * ctx.channel)
        rounded = torch.round(steps)
        codes = rounded + zero_point
        inside = (codes >= 0) & (codes <= ctx.top)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = gradient * inside if ctx.channel is None else gradient * inside / ctx.channel
            grad_x = grad_x.to(x.dtype)
        grad_scale = None
        if ctx.needs_input_grad[1]:
            slope = torch.where(inside, rounded - steps, codes.clamp(min=0).minimum(ctx.top) - zero_point)
            grad_scale = (gradient * slope).sum_to_size(scale.shape)
        return grad_x, grad_scale, None, None, None
