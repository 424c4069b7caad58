"""Time-smoothed relation distillation (MPQ-DM, arXiv:2412.11549): features of two networks agree in how their positions
relate to each other, averaged over consecutive trajectory steps.

The authors' released code detaches both features, so that its loss has no gradient (mpq-dm@2b05dd7); here it has one,
through every step that is averaged.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def positions_last(feature: Tensor) -> Tensor:
    """Return a feature map (B, C, *space), or tokens (B, T, C), as (B, positions, C)."""
    return feature.flatten(2).transpose(1, 2) if feature.dim() > 3 else feature


def smoothed(feature: Tensor, window: int) -> Tensor:
    """Average runs of `window` consecutive rows: (B, ...) to (B / window, ...)."""
    return feature.unflatten(0, (-1, window)).mean(dim=1)


def log_relations(feature: Tensor) -> Tensor:
    """Return the logarithms of each position's relations to all positions: softmax of cosine similarities.

    Parameters
    ----------
    feature : Tensor, shape (B, positions, C)

    Returns
    -------
    Tensor, shape (B, positions, positions); rows are distributions
    """
    unit = F.normalize(feature, dim=-1)
    return (unit @ unit.transpose(1, 2)).log_softmax(dim=-1)


def relation_loss(feature: Tensor, target: Tensor, window: int, positions: Tensor | None = None) -> Tensor:
    """Return the divergence of relations, KL(target || feature) averaged over positions and over samples.

    The paper sums over positions: its weight then depends on how many there are, and on how many are drawn.

    Parameters
    ----------
    feature, target : Tensor, shape (B, C, *space) or (B, T, C)
        Of the quantized and the full-precision network; rows of one sample at `window` consecutive steps lie together.
    positions : Tensor, shape (P,), dtype int64, optional
        Positions to relate; all by default.
    """
    own, other = (smoothed(positions_last(each), window) for each in (feature, target))
    if positions is not None:
        own, other = own[:, positions], other[:, positions]
    wanted = log_relations(other)
    return F.kl_div(log_relations(own), wanted, reduction="sum", log_target=True) / (own.shape[0] * own.shape[1])
