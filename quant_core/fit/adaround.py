"""Learned weight rounding: AdaRound.

Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", arXiv:2004.10568.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quant_core.nn.layers import QuantLayer, weight_from_matrix, weight_matrix

GAMMA, ZETA = -0.1, 1.1


class SoftRounding:
    """One layer's rounding variables: each weight chooses softly between two neighbouring codes.

    Parameters
    ----------
    layer : QuantLayer
        With the grid and the codes to start from.
    weight : Tensor, shape of the weight, float32
        Full-precision weight.
    trust : float
        In [0, 1): how far the start leans from the weight's own position between the two codes (0, AdaRound's start) to
        the code that the layer has (a closed-form rounding that is to be refined).

    Attributes
    ----------
    alpha : Tensor, shape (C_out, K), requires grad
    """

    def __init__(self, layer: QuantLayer, weight: Tensor, *, trust: float = 0.0) -> None:
        self.layer = layer
        self.top = torch.as_tensor(layer.top, dtype=torch.float32)
        columns = layer.group_index.to(weight.device)
        self.scale = layer.scale[:, columns].float()
        self.zero_point = layer.zero_point[:, columns].float()
        position = weight_matrix(weight.float()) / self.scale + self.zero_point
        codes = layer.codes().float()
        # The two neighbours: the code that the layer has, and the next one towards the weight.
        self.lower = torch.where(position >= codes, codes, codes - 1)
        fraction = (position - self.lower).clamp(0.01, 0.99)
        start = (1 - trust) * fraction + trust * (codes - self.lower)
        self.alpha = _inverse_sigmoid(start.clamp(0.01, 0.99)).requires_grad_()

    def soft(self) -> Tensor:
        """Return h(alpha) in [0, 1], shape (C_out, K): the rectified sigmoid (Eq. 23)."""
        return (torch.sigmoid(self.alpha) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def weight(self) -> Tensor:
        """Return the soft-rounded weight, shape of the weight."""
        codes = (self.lower + self.soft()).clamp(min=0).minimum(self.top)
        return weight_from_matrix((codes - self.zero_point) * self.scale, self.layer.shape)

    def regulariser(self, beta: float) -> Tensor:
        """Return sum(1 - |2 h - 1|^beta), which is 0 where every weight has chosen (Eq. 24)."""
        return (1 - (2 * self.soft() - 1).abs().pow(beta)).sum()

    def commit(self) -> None:
        """Give the layer the codes that were chosen."""
        codes = (self.lower + (self.alpha.detach() >= 0)).clamp(min=0).minimum(self.top).to(torch.uint8)
        self.layer.set_codes(codes, self.layer.scale, self.layer.zero_point)


def _inverse_sigmoid(h: Tensor) -> Tensor:
    """Return alpha with h(alpha) = h, for h in (0, 1)."""
    return -torch.log((ZETA - GAMMA) / (h - GAMMA) - 1)


def anneal(iteration: int, iterations: int, warmup: float, beta: tuple[float, float]) -> float | None:
    """Return the regulariser's exponent: None during the warm-up, then falling linearly from beta[0] to beta[1]."""
    first = math.ceil(warmup * iterations)
    if iteration < first:
        return None
    share = (iteration - first) / max(1, iterations - 1 - first)
    return beta[0] + (beta[1] - beta[0]) * share
