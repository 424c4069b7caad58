"""Closed-form rounding: codes that minimise a layer's output error to second order, without gradients.

GPTQ (Frantar et al., arXiv:2210.17323) rounds column by column and lets the columns that are left absorb the error; cyclic coordinate
descent then revisits each column with all others fixed, and the scales are refitted to the codes by least squares. Minimised is

    E(Q) = sum over output channels  (w - q) H (w - q)^T,     H = E[x x^T]

for the weight matrix w (C_out, K) and q = (codes - zero_point) * scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quant_core.ranges import QParams

_BLOCK = 128


@dataclass(frozen=True, slots=True)
class ClosedFormConfig:
    """`damping`: share of the mean diagonal added to H. `sweeps`: coordinate-descent sweeps. `refits`: rounds of scale refit and sweeps."""

    damping: float = 0.01
    sweeps: int = 4
    refits: int = 2


def damped(hessian: Tensor, damping: float) -> Tensor:
    """Return H + damping * mean(diag H) I; columns that are never active get a unit diagonal, so that H is positive definite."""
    diagonal = hessian.diagonal()
    ridge = damping * diagonal.mean().clamp(min=1e-12)
    return hessian + torch.diag(ridge + (diagonal == 0).float())


def round_closed_form(
    weight: Tensor, hessian: Tensor, grid: QParams, bits: int, group_index: Tensor, config: ClosedFormConfig
) -> tuple[Tensor, QParams]:
    """Choose the codes of a weight matrix.

    Parameters
    ----------
    weight : Tensor, shape (C_out, K), dtype float32
    hessian : Tensor, shape (K, K), dtype float32
        Second moment of the input, not yet damped.
    grid : QParams
        Scales and zero points, shape (C_out, G).
    group_index : Tensor, shape (K,), dtype int64
        Group of each column.

    Returns
    -------
    (Tensor, QParams)
        Codes (C_out, K), dtype uint8, and the grid with refitted scales.
    """
    h = damped(hessian, config.damping)
    codes = _gptq(weight, h, grid, bits, group_index)
    codes = _descend(weight, h, grid, bits, group_index, codes, config.sweeps)
    for _ in range(config.refits):
        grid = refit_scales(weight, h, grid, group_index, codes)
        codes = _descend(weight, h, grid, bits, group_index, codes, config.sweeps)
    return codes.to(torch.uint8), grid


def output_error(weight: Tensor, hessian: Tensor, grid: QParams, group_index: Tensor, codes: Tensor) -> Tensor:
    """Return E(Q) of each output channel, shape (C_out,)."""
    error = weight - _dequantize(codes.float(), grid, group_index)
    return ((error @ hessian) * error).sum(dim=1)


def _dequantize(codes: Tensor, grid: QParams, group_index: Tensor) -> Tensor:
    return (codes - grid.zero_point[:, group_index]) * grid.scale[:, group_index]


def _gptq(weight: Tensor, h: Tensor, grid: QParams, bits: int, group_index: Tensor) -> Tensor:
    """Round column by column, most active first, spreading each error over the columns that are left (GPTQ, Alg. 1)."""
    order = torch.argsort(h.diagonal(), descending=True)
    w = weight[:, order].clone()
    scale, zero_point = grid.scale[:, group_index[order]], grid.zero_point[:, group_index[order]]
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h[order][:, order])), upper=True)
    codes, top = torch.empty_like(w), 2**bits - 1
    for start in range(0, w.shape[1], _BLOCK):
        stop = min(start + _BLOCK, w.shape[1])
        errors = torch.empty(len(w), stop - start)
        for j in range(start, stop):
            codes[:, j] = (torch.round(w[:, j] / scale[:, j]) + zero_point[:, j]).clamp_(0, top)
            error = (w[:, j] - (codes[:, j] - zero_point[:, j]) * scale[:, j]) / inverse[j, j]
            w[:, j:stop] -= error[:, None] * inverse[j, j:stop]
            errors[:, j - start] = error
        w[:, stop:] -= errors @ inverse[start:stop, stop:]
    restored = torch.empty_like(codes)
    restored[:, order] = codes
    return restored


def _descend(
    weight: Tensor, h: Tensor, grid: QParams, bits: int, group_index: Tensor, codes: Tensor, sweeps: int
) -> Tensor:
    """Give each column in turn its best codes with all others fixed; E never grows (up to float rounding)."""
    scale, zero_point = grid.scale[:, group_index], grid.zero_point[:, group_index]
    codes, top = codes.clone().float(), 2**bits - 1
    q = (codes - zero_point) * scale
    # Columns in rows: the work of one coordinate is then contiguous.
    gradient = (h @ (q - weight).T).contiguous()
    q, codes, scale, zero_point = (t.T.contiguous() for t in (q, codes, scale, zero_point))
    diagonal = h.diagonal()
    for _ in range(sweeps):
        changed = False
        for j in range(len(h)):
            best = (torch.round((q[j] - gradient[j] / diagonal[j]) / scale[j]) + zero_point[j]).clamp_(0, top)
            moved = torch.nonzero(best != codes[j]).flatten()
            if len(moved) == 0:
                continue
            changed = True
            step = (best[moved] - codes[j][moved]) * scale[j][moved]
            gradient[:, moved] += h[:, j, None] * step
            q[j, moved] += step
            codes[j, moved] = best[moved]
        if not changed:
            break
    return codes.T.contiguous()


def refit_scales(weight: Tensor, h: Tensor, grid: QParams, group_index: Tensor, codes: Tensor) -> QParams:
    """Fit the scales to the codes: per output channel the G scales that minimise E, a G x G least-squares problem.

    A fit that is not positive, or that makes the error larger, is not taken.
    """
    centred = codes.float() - grid.zero_point[:, group_index]
    groups = grid.scale.shape[1]
    member = torch.zeros(len(group_index), groups)
    member[torch.arange(len(group_index)), group_index] = 1
    hw = h @ weight.T  # (K, C_out)
    right = ((centred.T * hw).T @ member).double()  # (C_out, G)
    left = torch.stack([_gram(row, h, member) for row in centred]).double()
    left += 1e-9 * left.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None] * torch.eye(groups) + 1e-12 * torch.eye(
        groups
    )
    fitted = torch.linalg.solve(left, right).float()
    usable = (fitted > 0.5 * grid.scale) & (fitted < 2 * grid.scale)
    proposal = QParams(torch.where(usable, fitted, grid.scale), grid.zero_point)
    before = output_error(weight, h, grid, group_index, codes)
    after = output_error(weight, h, proposal, group_index, codes)
    keep = (after < before)[:, None]
    return QParams(torch.where(keep, proposal.scale, grid.scale), grid.zero_point)


def _gram(row: Tensor, h: Tensor, member: Tensor) -> Tensor:
    """Return M^T diag(c) H diag(c) M for one output channel's centred codes c, shape (G, G)."""
    weighted = member * row[:, None]
    return weighted.T @ (h @ weighted)
