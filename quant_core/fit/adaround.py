"""Learned weight rounding: AdaRound.

Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", arXiv:2004.10568.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from quant_core.nn.layers import QuantLayer, weight_from_matrix, weight_matrix
from quant_spec.passes.reconstruct import Reconstruct
from quant_spec.passes.temporal import TemporalFit

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
        self.scale = layer.steps[:, columns]
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
        self.layer.replace_codes(codes)


def learn_rounding(
    layers: Mapping[str, QuantLayer],
    weights: Mapping[str, Tensor],
    loss: Callable[[], Tensor],
    start_loss: float,
    config: Reconstruct | TemporalFit,
    others: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Learn the rounding of some layers with Adam, and give the layers the codes that were chosen.

    Minimised is loss / start_loss + rounding_weight * (mean of the regulariser over the weights). The loss is relative
    to its start, because an absolute balance (the papers' 0.01 per weight) lets the regulariser drown a loss that a
    closed-form start made small.

    Parameters
    ----------
    layers : mapping of str to QuantLayer
        With the grids and codes to start from.
    weights : mapping of str to Tensor
        Full-precision weights of the layers that are learned.
    loss : callable
        Returns the error of one batch, shape (), while the layers multiply with their soft-rounded weights.
    start_loss : float
        What `loss` gives at the start, > 0.
    config : Reconstruct or TemporalFit
        `iterations`, `lr`, `trust`, `rounding_weight`, `warmup`, `beta`.
    others : sequence of mapping
        More groups of Adam's parameters, which are learned beside the rounding.
    """
    roundings = [SoftRounding(layers[name], weight, trust=config.trust) for name, weight in weights.items()]
    count = sum(rounding.alpha.numel() for rounding in roundings)
    optimizer = torch.optim.Adam([{"params": [r.alpha for r in roundings], "lr": config.lr}, *map(dict, others)])
    for iteration in range(config.iterations):
        with _soft_weights(roundings):
            total = loss() / start_loss
        beta = anneal(iteration, config.iterations, config.warmup, config.beta)
        if beta is not None:
            total = total + config.rounding_weight * sum(r.regulariser(beta) for r in roundings) / count
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    for rounding in roundings:
        rounding.commit()


@contextmanager
def _soft_weights(roundings: Sequence[SoftRounding]) -> Iterator[None]:
    """Let the layers multiply with their soft-rounded weights."""
    for rounding in roundings:
        rounding.layer.soft_weight = rounding.weight()
    try:
        yield
    finally:
        for rounding in roundings:
            rounding.layer.soft_weight = None


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
