"""Fake quantization with gradients: the straight-through estimator for the input, LSQ's gradients for the grid.

The forward is exactly `kernels.affine.fake_quantize_affine`, so that what is learned is what is deployed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.affine import fake_quantize_affine
from kernels.fp8 import FP8_MAX, fake_quantize_fp8

#: In steps: outside of every grid, and times 0 it is 0, which infinity is not.
_FAR = 1e30


class FakeQuantize(torch.autograd.Function):
    """x_hat = (clamp(round(x / s) + z, 0, top) - z) s.

    dx_hat/dx is 1 inside the range and 0 outside; dx_hat/ds is round(x / s) - x / s inside and code - z outside
    (Esser et al., "Learned Step Size Quantization", arXiv:1902.08153, Eq. 3); dx_hat/dz is 0 inside and -s outside
    (Bhalgat et al., "LSQ+", arXiv:2004.09576, Eq. 5). With a `channel_scale`, x is
    divided by s * channel_scale and multiplied by s: dx_hat/dx is 1 / channel_scale inside the range.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, top: int | Tensor, channel_scale: Tensor | None = None
    ) -> Tensor:
        """Return the dequantized codes, shape of `x`, float32; the others broadcast against `x`."""
        input_scale = scale if channel_scale is None else scale * channel_scale
        ctx.save_for_backward(x, scale, zero_point)
        ctx.top, ctx.channel_scale = torch.as_tensor(top, dtype=torch.float32, device=x.device), channel_scale
        return fake_quantize_affine(x, input_scale, zero_point, 0, top, output_scale=scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        """Return the gradients of `x`, `scale` and `zero_point`."""
        (gradient,) = gradients
        x, scale, zero_point = ctx.saved_tensors
        steps = (x / (scale if ctx.channel_scale is None else scale * ctx.channel_scale)).clamp_(-_FAR, _FAR)
        codes = torch.round(steps).add_(zero_point)
        kept = codes.clamp(min=0).minimum(ctx.top)
        inside = (codes == kept).float()  # a product with it takes a tenth of the time that torch.where does
        grad_inside = gradient * inside
        grad_x = grad_scale = grad_zero = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_inside if ctx.channel_scale is None else grad_inside / ctx.channel_scale).to(x.dtype)
        if ctx.needs_input_grad[1]:
            slope = kept.sub_(zero_point).sub_(steps.mul_(inside))
            grad_scale = (gradient * slope).sum_to_size(scale.shape)
        if ctx.needs_input_grad[2]:
            grad_zero = (grad_inside - gradient).mul_(scale).sum_to_size(zero_point.shape)
        return grad_x, grad_scale, grad_zero, None, None


class FakeQuantizeFp8(torch.autograd.Function):
    """x_hat = e4m3(clamp(x / s, -448, 448)) s, with the gradients of `FakeQuantize` at a zero point of 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, channel_scale: Tensor | None = None) -> Tensor:
        """Return what the numbers stand for, shape of `x`, float32; the others broadcast against `x`."""
        input_scale = scale if channel_scale is None else scale * channel_scale
        result = fake_quantize_fp8(x, input_scale, scale)
        ctx.save_for_backward(x, scale, result)
        ctx.channel_scale = channel_scale
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Return the gradients of `x` and `scale`."""
        (gradient,) = gradients
        x, scale, result = ctx.saved_tensors
        steps = x / (scale if ctx.channel_scale is None else scale * ctx.channel_scale)
        inside = steps.abs() <= FP8_MAX
        grad_x = grad_scale = None
        if ctx.needs_input_grad[0]:
            grad_inside = gradient * inside
            grad_x = (grad_inside if ctx.channel_scale is None else grad_inside / ctx.channel_scale).to(x.dtype)
        if ctx.needs_input_grad[1]:
            numbers = result / scale
            grad_scale = (gradient * torch.where(inside, numbers - steps, numbers)).sum_to_size(scale.shape)
        return grad_x, grad_scale, None


def round_through(x: Tensor) -> Tensor:
    """Return `x` rounded to whole numbers, with the gradient of `x` itself."""
    return x + (torch.round(x) - x).detach()
