"""Low-rank quantization-aware tuning of one layer: merge, then quantize.

    W_hat = Q(W + B A)

with a grid that is learned too (He et al., "EfficientDM", arXiv:2310.03270, Sec. 3.2). A convolution has one product
B_u A_u for each position u of its kernel, as in MPQ-DM. What is left in the end are codes on a grid: nothing is added
at inference. Where we differ from the authors' code (EfficientDM@293e212, mpq-dm@2b05dd7), and why:

- W starts as near to the layer's weight as the codes of its start allow, so that tuning begins at those codes (a
  closed-form rounding) and not at the nearest ones.
- Step sizes are learned as s exp(theta): positive, and one rate serves layers of any scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from quant_core.nn.layers import QuantLayer, exact_scale, group_parts, weight_from_matrix, weight_matrix
from quant_core.nn.straight_through import FakeQuantize, round_through


class LowRankWeight:
    """The tuned weight of one layer.

    Parameters
    ----------
    layer : QuantLayer
        With the grid and the codes to start from.
    weight : Tensor, shape of the weight, float32
        Full-precision weight; its input channels are scaled here, where the layer scales them.
    rank : int
        Of B A, at most what the layer's channels allow.
    generator : torch.Generator
        Draws A (Kaiming-uniform); B starts as zero.

    Attributes
    ----------
    a : Tensor, shape (taps, rank, C_in), requires grad
    b : Tensor, shape (taps, C_out, rank), requires grad
    start_scale, log_scale : Tensor, shape as `layer.scale`
        The step, and the logarithm of what it is multiplied with, which requires grad; multipliers of groups stay.
    zero_point : Tensor, shape as `layer.zero_point`, requires grad unless the grid is symmetric
        The code of zero before rounding.
    bias : Tensor, shape (C_out,), requires grad, or None
    """

    def __init__(self, layer: QuantLayer, weight: Tensor, rank: int, generator: torch.Generator) -> None:
        self.layer = layer
        out, columns = layer.shape[0], layer.columns
        taps = math.prod(layer.shape[2:])
        inner = columns // taps
        rank = min(rank, out, inner)
        self.group_index = layer.group_index.to(weight.device)
        self.start_scale = layer.scale.float().clone()
        self.multiplier = layer.multiplier.float() + 1 if layer.spec.weight.is_multiplied else None
        self.base = _latent(weight_matrix(layer.scaled(weight.float())), layer, self.group_index)
        bound = 1 / math.sqrt(inner)  # Kaiming-uniform with a = sqrt(5), as torch's layers and the authors' A
        drawn = torch.rand(taps, rank, inner, generator=generator).to(weight.device)
        self.a = ((2 * drawn - 1) * bound).requires_grad_()
        self.b = torch.zeros(taps, out, rank, device=weight.device, requires_grad=True)
        self.log_scale = torch.zeros_like(self.start_scale, requires_grad=True)
        self.zero_point = layer.zero_point.float().clone().requires_grad_(not layer.spec.weight.symmetric)
        self.bias = None if layer.bias is None else layer.bias.detach().clone().requires_grad_()

    def parameters(self) -> Mapping[str, Tensor]:
        """Return what is learned, by name."""
        grid = {"log_scale": self.log_scale} | (
            {"zero_point": self.zero_point} if self.zero_point.requires_grad else {}
        )
        return {"a": self.a, "b": self.b, **grid} | ({} if self.bias is None else {"bias": self.bias})

    def grid(self) -> tuple[Tensor, Tensor]:
        """Return steps of groups, as they can be stored, and zero points, whole numbers; with gradients."""
        scale, top = self.start_scale * self.log_scale.exp(), torch.as_tensor(self.layer.top, dtype=torch.float32)
        zero_point = torch.minimum(round_through(self.zero_point).clamp(min=0), top)
        if self.multiplier is None:
            return scale.to(self.layer.scale.dtype).float(), zero_point
        scale = scale + (exact_scale(scale.detach()) - scale.detach())
        parts = group_parts(self.multiplier.shape[1], self.layer.spec).to(scale.device)
        least, most = top - 127 // self.multiplier, 128 // self.multiplier  # products stay within int8
        return scale[:, parts] * self.multiplier, torch.minimum(torch.maximum(zero_point, least), most)

    def merged(self) -> Tensor:
        """Return W + B A as a matrix, shape (C_out, K)."""
        return self.base + torch.bmm(self.b, self.a).transpose(0, 1).flatten(1)

    def weight(self) -> Tensor:
        """Return the quantized weight, shape of the weight; straight through to all that is learned."""
        scale, zero_point = self.grid()
        if scale.shape[1] > 1:
            scale, zero_point = scale[:, self.group_index], zero_point[:, self.group_index]
        return weight_from_matrix(
            FakeQuantize.apply(self.merged(), scale, zero_point, self.layer.top), self.layer.shape
        )

    def apply(self) -> None:
        """Let the layer multiply with what has been learned so far."""
        self.layer.soft_weight = self.weight()

    def release(self) -> None:
        """Let the layer multiply with what is stored."""
        self.layer.soft_weight = None

    @torch.no_grad()
    def commit(self) -> None:
        """Give the layer the codes, grid and bias that were learned; it then multiplies with exactly `weight()`."""
        scale, zero_point = self.grid()
        columns = (scale[:, self.group_index], zero_point[:, self.group_index])
        codes = torch.round(self.merged() / columns[0]).add_(columns[1]).clamp_(min=0)
        codes = torch.minimum(codes, torch.as_tensor(self.layer.top, dtype=torch.float32))
        self.layer.set_codes(codes.to(torch.uint8), scale, zero_point, self.multiplier)
        if self.bias is not None and self.layer.bias is not None:
            self.layer.bias.copy_(self.bias)


def _latent(matrix: Tensor, layer: QuantLayer, group_index: Tensor) -> Tensor:
    """Return the matrix nearest to `matrix` whose nearest codes are those of the layer."""
    scale, zero_point = layer.steps[:, group_index], layer.zero_point.float()[:, group_index]
    codes = layer.codes().float()
    nearest = torch.minimum(
        (torch.round(matrix / scale) + zero_point).clamp_(min=0), torch.as_tensor(layer.top).float()
    )
    value = (codes - zero_point) * scale
    within = value + (matrix - value).clamp(-0.49 * scale, 0.49 * scale)
    return torch.where(nearest == codes, matrix, within)
