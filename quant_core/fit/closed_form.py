"""Closed-form rounding: codes that minimise a layer's output error to second order, without gradients.

GPTQ (Frantar et al., arXiv:2210.17323): columns are rounded one after the other, and those that are left absorb the
error. Minimised is

    E(Q) = sum over output channels  (w - q) H (w - q)^T,     H = E[x x^T]

for the weight matrix w (C_out, K) and q = (codes - zero_point) * scale. Revisiting the columns afterwards (cyclic
coordinate descent) and refitting scales to the codes lower E a little further, but were measured to change the images
of the quantized model by less than their confidence interval, at three times the cost; so they are not here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quant_core.nn.layers import greatest_code
from quant_core.nn.ranges import QParams

_BLOCK = 128


def damped(hessian: Tensor, damping: float) -> Tensor:
    """Return H + damping * mean(diag H) I, positive definite: columns that are never active get a unit diagonal."""
    diagonal = hessian.diagonal()
    ridge = damping * diagonal.mean().clamp(min=1e-12)
    return hessian + torch.diag(ridge + (diagonal == 0).float())


@dataclass(frozen=True, slots=True)
class Factor:
    """What rounding needs of a second moment, whatever the weight and its bits.

    `order`, shape (K,): columns in the order of falling diag H. `inverse`, shape (K, K): upper Cholesky factor of the
    inverse of the damped H in that order.
    """

    order: Tensor
    inverse: Tensor


def factorize(hessian: Tensor, damping: float) -> Factor:
    """Factorize a second moment, shape (K, K), float32, not yet damped; cost O(K^3)."""
    h = damped(hessian, damping)
    order = torch.argsort(h.diagonal(), descending=True)
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h[order][:, order])), upper=True)
    return Factor(order, inverse)


def round_closed_form(weight: Tensor, factor: Factor, grid: QParams, bits: int | Tensor, group_index: Tensor) -> Tensor:
    """Choose the codes of a weight matrix (GPTQ, Alg. 1, columns in the order of falling diag H).

    Parameters
    ----------
    weight : Tensor, shape (C_out, K), dtype float32
    factor : Factor
        Of the second moment of the input.
    grid : QParams
        Scales and zero points, shape (C_out, G) or (1, 1).
    bits : int or Tensor, shape (C_out,)
        Of all codes, or of those of each output channel.
    group_index : Tensor, shape (K,), dtype int64
        Group of each column.

    Returns
    -------
    Tensor, shape (C_out, K), dtype uint8
        Codes in [0, 2**bits - 1].

    Notes
    -----
    Cost O(C_out K^2).
    """
    order, inverse = factor.order, factor.inverse
    w = weight[:, order].clone()
    scale = grid.scale[:, group_index[order]].expand_as(w)
    zero_point = grid.zero_point[:, group_index[order]].expand_as(w)
    codes, top = torch.empty_like(w), torch.as_tensor(greatest_code(bits)).to(w).reshape(-1)
    for start in range(0, w.shape[1], _BLOCK):
        stop = min(start + _BLOCK, w.shape[1])
        errors = torch.empty_like(w[:, start:stop])
        for j in range(start, stop):
            codes[:, j] = (torch.round(w[:, j] / scale[:, j]) + zero_point[:, j]).clamp_(min=0).minimum(top)
            error = (w[:, j] - (codes[:, j] - zero_point[:, j]) * scale[:, j]) / inverse[j, j]
            w[:, j:stop] -= error[:, None] * inverse[j, j:stop]
            errors[:, j - start] = error
        w[:, stop:] -= errors @ inverse[start:stop, stop:]
    restored = torch.empty_like(codes)
    restored[:, order] = codes
    return restored.to(torch.uint8)
