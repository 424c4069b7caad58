"""The largest singular values of a weight as two thin 16-bit matrices (SVDQuant, Sec. 4.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from quant_core.fit.closed_form import damped
from quant_core.fit.low_rank_branch import LowRankBranch

#: Matrices whose smaller side is at most this long are decomposed exactly, others by random projection.
EXACT_SIDE = 512
#: Singular vectors drawn beyond those that are wanted, and rounds of subspace iteration.
_OVERSAMPLED, _ITERATIONS = 8, 4


def truncated_svd(matrix: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return the `rank` largest singular values with their vectors.

    Parameters
    ----------
    matrix : Tensor, shape (N, K), dtype float32
    generator : torch.Generator
        For the projection of large matrices (Halko et al., arXiv:0909.4061, Alg. 4.4).

    Returns
    -------
    Tensor, shape (N, R); Tensor, shape (R,), falling; Tensor, shape (R, K)
    """
    if min(matrix.shape) <= EXACT_SIDE:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return left[:, :rank], values[:rank], right[:rank]
    drawn = torch.randn(matrix.shape[1], min(rank + _OVERSAMPLED, *matrix.shape), generator=generator)
    basis = torch.linalg.qr(matrix @ drawn.to(matrix.device)).Q
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    left, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ left[:, :rank], values[:rank], right[:rank]


def branches_of(
    scaled: Tensor,
    columns: Tensor,
    ranks: list[int],
    moment: Tensor | None,
    generator: torch.Generator,
    *,
    damping: float,
) -> list[LowRankBranch]:
    """Return the best branch of each rank, rising.

    Parameters
    ----------
    scaled : Tensor, shape (N, K), dtype float32
        The weight matrix, its columns multiplied by `columns`.
    columns : Tensor, shape (K,), dtype float32, > 0
        What the input is divided by; branches read it undivided.
    moment : Tensor, shape (K, K), or None
        Best is what leaves least error at the output for inputs x / columns of this second moment; for None, what
        leaves the smallest weight (the truncated SVD).

    Notes
    -----
    For H = C C^T, the error tr((W - L) H (W - L)^T) is least where L is W projected on the first left singular vectors
    of W C. Both matrices get a square root of each singular value, and are rounded to bfloat16.
    """
    if moment is None:
        left, values, right = truncated_svd(scaled, ranks[-1], generator)
        down = right * values[:, None]
    else:
        left, _, _ = truncated_svd(scaled @ torch.linalg.cholesky(damped(moment, damping)), ranks[-1], generator)
        down = left.T @ scaled
    size = down.norm(dim=1).sqrt().clamp(min=1e-20)
    ups, downs = (left * size).bfloat16(), (down / size[:, None] / columns).bfloat16()
    return [LowRankBranch(downs[:rank].contiguous(), ups[:, :rank].contiguous()) for rank in ranks]
