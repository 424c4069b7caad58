"""Range estimators: scale and zero point of an affine quantizer from data.

All work on rows at once: the last dimension is what shares one range. Zero is always inside the range, so that padding
and the zero of SiLU-like outputs are exact, and scales are floored so that constant rows stay finite.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.affine import fake_quantize_affine
from kernels.fp8 import fake_quantize_fp8, fp8_scale
from quant_spec.enums import RangeMethod
from quant_spec.ranges import RangeSpec

SCALE_FLOOR = 1e-8
SEARCH_STEPS = 80
SEARCH_POWER = 2.4
# Values that are rounded together, of all that are tried.
_CHUNK = 1 << 18


@dataclass(frozen=True, slots=True)
class QParams:
    """An affine grid: x_hat = (code - zero_point) * scale, codes in [0, 2**bits - 1].

    `scale` is float32 and positive, `zero_point` float32 with integer values; both have the data's shape without its
    last dimension. `multiplier`, of that shape, has whole numbers where a scale is such a number times one that several
    share; the quotient is exact.
    """

    scale: Tensor
    zero_point: Tensor
    multiplier: Tensor | None = None


def qparams_from_range(low: Tensor, high: Tensor, bits: int, *, symmetric: bool) -> QParams:
    """Return the grid that covers [low, high], both float32 of any one shape.

    A symmetric grid is stored as unsigned codes with the fixed zero point 2**(bits-1), so
    -2**(bits-1) .. 2**(bits-1)-1 around zero.
    """
    levels = 2**bits - 1
    if symmetric:
        bound = torch.maximum(-low, high).clamp(min=0)
        scale = (bound / (levels // 2)).clamp(min=SCALE_FLOOR)
        return QParams(scale, torch.full_like(scale, 2 ** (bits - 1)))
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = ((high - low) / levels).clamp(min=SCALE_FLOOR)
    return QParams(scale, torch.round(-low / scale).clamp(0, levels))


def choose_qparams(rows: Tensor, bits: int, *, symmetric: bool, spec: RangeSpec) -> QParams:
    """Return one grid per row.

    Parameters
    ----------
    rows : Tensor, shape (..., n), dtype float32
        What shares one range lies along the last dimension.

    Returns
    -------
    QParams
        `scale` and `zero_point` of shape (...).

    Notes
    -----
    MSE is BRECQ's search (Li et al., arXiv:2102.05426): both ends of the min-max range shrink by 1 - 0.01 i, i = 0..79,
    and the candidate with the smallest mean |x - Q(x)|^2.4 wins; here for all rows at once.
    """
    low, high = find_range(rows, spec)
    if spec.method is not RangeMethod.MSE:
        return qparams_from_range(low, high, bits, symmetric=symmetric)
    return _search(rows, low, high, bits, symmetric=symmetric)


def choose_fp8_scale(rows: Tensor, spec: RangeSpec) -> QParams:
    """Return one scale of E4M3 numbers per row (..., n), zero points 0.

    The range's greatest magnitude becomes 448. MSE searches the shrunken ranges of `choose_qparams` for the smallest
    mean |x - Q(x)|^2.4: what saturates costs much and what is rounded gains little, so it rarely shrinks far.
    """
    low, high = find_range(rows, spec)
    best = fp8_scale(torch.maximum(-low, high).clamp(min=0))
    if spec.method is RangeMethod.MSE:
        least, start = torch.full_like(best, torch.inf), best
        for i in range(SEARCH_STEPS):
            scale = start * (1 - 0.01 * i)
            score = ((rows - fake_quantize_fp8(rows, scale[..., None])).abs() ** SEARCH_POWER).mean(dim=-1)
            best, least = torch.where(score < least, scale, best), torch.minimum(score, least)
    return QParams(best, torch.zeros_like(best))


def find_range(rows: Tensor, spec: RangeSpec) -> tuple[Tensor, Tensor]:
    """Return the least and greatest value of rows (..., n), without outliers if so asked; before any search."""
    if spec.method is not RangeMethod.PERCENTILE:
        return rows.amin(dim=-1), rows.amax(dim=-1)
    tail = (1 - spec.percentile) / 2
    return _quantile(rows, tail), _quantile(rows, 1 - tail)


def _quantile(rows: Tensor, q: float) -> Tensor:
    """Return the nearest-rank quantile along the last dimension (torch.quantile refuses more than 2**24 elements)."""
    n = rows.shape[-1]
    k = min(n, max(1, round(q * (n - 1)) + 1))
    if rows.is_cuda and torch.are_deterministic_algorithms_enabled():
        # On CUDA kthvalue refuses, since the index that it finds may be any of several; the value is the same.
        return rows.sort(dim=-1).values[..., k - 1]
    return rows.kthvalue(k, dim=-1).values


def _search(rows: Tensor, low: Tensor, high: Tensor, bits: int, *, symmetric: bool) -> QParams:
    best = qparams_from_range(low, high, bits, symmetric=symmetric)
    scale, zero_point = best.scale, best.zero_point
    best_score = torch.full_like(scale, torch.inf)
    shrinks = (1 - 0.01 * torch.arange(SEARCH_STEPS, dtype=torch.float64)).to(low)
    # As many shrinks at once as make work worth its calls; each row's score is the same mean of the same numbers.
    for some in shrinks.split(max(1, _CHUNK // max(1, rows.numel()))):
        factors = some.reshape(-1, *(1 for _ in low.shape))
        candidate = qparams_from_range(low * factors, high * factors, bits, symmetric=symmetric)
        tried = rows.expand(len(some), *rows.shape)
        error = rows - fake_quantize_affine(
            tried, candidate.scale[..., None], candidate.zero_point[..., None], 0, 2**bits - 1
        )
        score, first = (error.abs() ** SEARCH_POWER).mean(dim=-1).min(0)
        better = score < best_score
        best_score = torch.where(better, score, best_score)
        scale, zero_point = (
            torch.where(better, found.gather(0, first[None])[0], kept)
            for found, kept in ((candidate.scale, scale), (candidate.zero_point, zero_point))
        )
    return QParams(scale, zero_point)
