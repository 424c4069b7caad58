"""The weight of one layer whose codes are frozen while its scales are learned.

    W_hat = s exp(theta) (codes - zero_point)

(Kim et al., "PEQA", arXiv:2305.14152, Sec. 3.2; the bias is learned too.) Where an output channel has one scale, its
output, without the bias, is in proportion to it, so theta's gradient is read off the output: the weight, which is many
times larger, then needs none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from quant_core.nn.layers import QuantLayer, exact_scale, group_parts, weight_from_matrix


class ScaledWeight:
    """The scaled weight of one layer.

    Parameters
    ----------
    layer : QuantLayer
        With the codes, or E4M3 numbers, that stay, and the scales to start from.

    Attributes
    ----------
    start_scale, log_scale : Tensor, shape as `layer.scale`
        The scale, and the logarithm of what it is multiplied with, which requires grad; multipliers of groups stay.
    numbers : Tensor, shape (C_out, K)
        What scales are multiplied with.
    bias : Tensor, shape (C_out,), requires grad, or None
    """

    def __init__(self, layer: QuantLayer) -> None:
        self.layer = layer
        self.start_scale = layer.scale.float().clone()
        self.log_scale = torch.zeros_like(self.start_scale, requires_grad=True)
        self.bias = None if layer.bias is None else layer.bias.detach().clone().requires_grad_()
        self.numbers, self._columns = _numbers(layer)
        self._reads_output = self.start_scale.shape[1] == 1 and not layer.spec.low_rank
        self._handle: RemovableHandle | None = None

    def parameters(self) -> Mapping[str, Tensor]:
        """Return what is learned, by name."""
        return {"log_scale": self.log_scale} | ({} if self.bias is None else {"bias": self.bias})

    def scale(self) -> Tensor:
        """Return the scales, as they can be stored; with gradients."""
        scale = self.start_scale * self.log_scale.exp()
        if self.layer.spec.weight.is_multiplied:
            return scale + (exact_scale(scale.detach()) - scale.detach())
        return scale.to(self.layer.scale.dtype).float()

    def weight(self) -> Tensor:
        """Return the weight with the scales learned so far, shape of the weight; with gradients."""
        scale = self.scale()
        return weight_from_matrix(
            self.numbers * (scale if scale.shape[1] == 1 else scale[:, self._columns]), self.layer.shape
        )

    def apply(self) -> None:
        """Let the layer multiply with what has been learned so far."""
        if not self._reads_output:
            self.layer.soft_weight = self.weight()
            return
        with torch.no_grad():
            self.layer.soft_weight = self.weight()
        self._handle = self.layer.register_forward_hook(self._scaled)

    def _scaled(self, layer: QuantLayer, _: object, output: Tensor) -> Tensor:
        """Give an output's gradient to the scales."""
        shape = (-1,) if len(layer.shape) == 2 else (-1, *(1,) * (output.dim() - 2))
        bias = output.new_zeros(1) if self.bias is None else self.bias.detach()
        result: Tensor = _OutputScale.apply(output, self.log_scale.reshape(shape), bias.reshape(shape))
        return result

    def release(self) -> None:
        """Let the layer multiply with what is stored."""
        self.layer.soft_weight = None
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    @torch.no_grad()
    def commit(self) -> None:
        """Give the layer the scales and the bias that were learned; it then multiplies with exactly `weight()`."""
        self.layer.scale.copy_(self.scale())
        if self.bias is not None and self.layer.bias is not None:
            self.layer.bias.copy_(self.bias)


def _numbers(layer: QuantLayer) -> tuple[Tensor, Tensor]:
    """Return what a layer's scales are multiplied with, shape (C_out, K), and the scale of each column, shape (K,)."""
    index = layer.group_index.to(layer.scale.device)
    if layer.spec.weight.is_float:
        return layer.qweight.float(), index
    zero_point = layer.zero_point.float()
    numbers = layer.codes().float() - (zero_point if zero_point.shape[1] == 1 else zero_point[:, index])
    if not layer.spec.weight.is_multiplied:
        return numbers, index
    multiplier = layer.multiplier.float() + 1
    parts = group_parts(multiplier.shape[1], layer.spec).to(index.device)
    return numbers * multiplier[:, index], parts[index]


class _OutputScale(torch.autograd.Function):
    """y itself, of which exp(theta) is a factor but for the bias: dy/dtheta is y - bias."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, log_scale: Tensor, bias: Tensor) -> Tensor:
        """Return `output`; the others broadcast against it."""
        ctx.save_for_backward(output, bias)
        ctx.shape = log_scale.shape
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        """Return the gradients of `output` and `log_scale`."""
        (gradient,) = gradients
        output, bias = ctx.saved_tensors
        return gradient, (gradient * (output - bias)).sum_to_size(ctx.shape), None
