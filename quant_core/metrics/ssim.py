"""Structural similarity of images with full precision's of the same seeds (Wang et al. 2004), by torchmetrics."""

from __future__ import annotations

import torch
from torch import Tensor

#: Side of the Gaussian window; smaller images have no such figure.
WINDOW = 11


def ssim_per_sample(reference: Tensor, quantized: Tensor) -> Tensor:
    """Return the structural similarity of each image.

    Parameters
    ----------
    reference, quantized : Tensor, shape (n, C, H, W), dtype float32
        Pixels, clamped to [-1, 1].

    Returns
    -------
    Tensor, shape (n,), dtype float64
        1 for equal images; NaN for images with a side below 11 pixels.
    """
    if min(reference.shape[2:]) < WINDOW:
        return torch.full((len(reference),), torch.nan, dtype=torch.float64)
    from torchmetrics.functional.image import structural_similarity_index_measure

    values: Tensor = structural_similarity_index_measure(
        quantized.double().clamp(-1, 1), reference.double().clamp(-1, 1), data_range=2.0, reduction="none"
    )  # type: ignore[assignment]  # a tuple only if the full image is asked for
    return values.reshape(-1)
