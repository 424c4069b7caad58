"""Closed-form rounding: codes that minimise a layer's output error to second order, without gradients.

GPTQ (Frantar et al., arXiv:2210.17323): columns are rounded one after the other, and those that are left absorb the
error. Minimised is

    E(Q) = sum over output channels  (w - q) H (w - q)^T,     H = E[x x^T]

for the weight matrix w (C_out, K) and q = (codes - zero_point) * scale. Revisiting the columns afterwards (cyclic
coordinate descent) and refitting scales to the codes lower E a little further, but were measured to change the images
of the quantized model by less than their confidence interval, at three times the cost; so they are not here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import rounding
from kernels.fp8 import FP8, to_fp8
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
    top = torch.as_tensor(greatest_code(bits)).to(weight).reshape(-1).expand(len(weight)).contiguous()
    places = group_index[factor.order]
    scale, zero_point = (each[:, places].expand_as(weight).contiguous() for each in (grid.scale, grid.zero_point))

    def nearest(column: Tensor, at: int) -> tuple[Tensor, Tensor]:
        codes = (torch.round(column / scale[:, at]) + zero_point[:, at]).clamp_(min=0).minimum(top)
        return codes, (codes - zero_point[:, at]) * scale[:, at]

    def compiled(w: Tensor, numbers: Tensor, inverse: Tensor, start: int, stop: int) -> Tensor:
        return rounding.round_columns(w, numbers, inverse, scale, zero_point, top, start, stop)

    is_compiled = weight.device.type == "cpu" and rounding.is_built()
    return _sweep(weight, factor, compiled if is_compiled else _by_columns(nearest)).to(torch.uint8)


def round_closed_form_fp8(weight: Tensor, factor: Factor, scale: Tensor) -> Tensor:
    """Choose the E4M3 numbers of a weight matrix, as `round_closed_form` chooses codes.

    Parameters
    ----------
    scale : Tensor, shape (C_out, K), dtype float32
        Of each weight.

    Returns
    -------
    Tensor, shape (C_out, K), dtype float8_e4m3fn
    """

    ordered = scale[:, factor.order]

    def nearest(column: Tensor, at: int) -> tuple[Tensor, Tensor]:
        numbers = to_fp8(column, ordered[:, at]).float()
        return numbers, numbers * ordered[:, at]

    return _sweep(weight, factor, _by_columns(nearest)).to(FP8)  # exact: these are E4M3 numbers


#: Rounds columns `start` to `stop` of (weight, numbers, inverse, start, stop): changes what is left of the weight and
#: fills numbers; returns the errors over the factor's diagonal, shape (C_out, stop - start).
_RoundBlock = Callable[[Tensor, Tensor, Tensor, int, int], Tensor]


def _by_columns(nearest: Callable[[Tensor, int], tuple[Tensor, Tensor]]) -> _RoundBlock:
    """Round a block by tensor operations for each column.

    `nearest` gives the numbers that are nearest to a column, which is given with its place in the order, and what they
    stand for.
    """

    def round_block(w: Tensor, numbers: Tensor, inverse: Tensor, start: int, stop: int) -> Tensor:
        errors = torch.empty_like(w[:, start:stop])
        for j in range(start, stop):
            numbers[:, j], value = nearest(w[:, j], j)
            error = (w[:, j] - value) / inverse[j, j]
            w[:, j:stop] -= error[:, None] * inverse[j, j:stop]
            errors[:, j - start] = error
        return errors

    return round_block


def _sweep(weight: Tensor, factor: Factor, round_block: _RoundBlock) -> Tensor:
    """Round the columns of a weight matrix block by block, in the order of falling diag H; return the numbers."""
    order, inverse = factor.order, factor.inverse.contiguous()
    w = weight[:, order].contiguous()
    numbers = torch.empty_like(w)
    for start in range(0, w.shape[1], _BLOCK):
        stop = min(start + _BLOCK, w.shape[1])
        errors = round_block(w, numbers, inverse, start, stop)
        w[:, stop:] -= errors @ inverse[start:stop, stop:]
    restored = torch.empty_like(numbers)
    restored[:, order] = numbers
    return restored
