"""Samples as pictures: RGB views of pixels and of anything else, and grids to look at."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quant_spec.enums import SampleSpace

DIFFERENCE_GAIN = 4.0
#: White pixels between the images of a grid.
GRID_GAP = 2


def to_rgb(samples: Tensor, reference: Tensor, space: SampleSpace) -> Tensor:
    """Show samples as RGB images.

    Parameters
    ----------
    samples : Tensor, shape (n, C, H, W) or (n, tokens, C), dtype float32
    reference : Tensor, shape (m, ...) like `samples`
        Full-precision samples: they fix the range in which latents are shown.
    space : SampleSpace
        Whether the samples are pixels.

    Returns
    -------
    Tensor, shape (n, 3, H', W'), dtype float32, in [-1, 1]
        Pixels are only clamped; of latents, the first three channels, each scaled to the reference's range.
    """
    if space is SampleSpace.PIXELS:
        return samples.clamp(-1, 1).expand(-1, 3, -1, -1)
    shown, frame = _as_map(samples)[:, :3], _as_map(reference)[:, :3]
    low, high = frame.amin(dim=(0, 2, 3), keepdim=True), frame.amax(dim=(0, 2, 3), keepdim=True)
    scaled = ((shown - low) / (high - low).clamp(min=1e-8) * 2 - 1).clamp(-1, 1)
    missing = 3 - scaled.shape[1]
    return torch.cat([scaled, scaled[:, -1:].expand(-1, missing, -1, -1)], dim=1) if missing else scaled


def _as_map(samples: Tensor) -> Tensor:
    """View samples of any shape as (n, C, H, W); a square number of tokens becomes a square."""
    if samples.dim() == 4:
        return samples
    side = math.isqrt(samples.shape[1])
    if side > 1 and side * side == samples.shape[1]:
        return samples.transpose(1, 2).unflatten(2, (side, side))
    return samples.unsqueeze(2)


def signal_maps(signals: Tensor) -> Tensor:
    """Write signals, shape (n, C, L), line by line into maps (n, C, H, W), as square as can be; zeros fill the end."""
    length = signals.shape[2]
    width = math.isqrt(length - 1) + 1
    height = -(-length // width)
    return torch.nn.functional.pad(signals, (0, height * width - length)).unflatten(2, (height, width))


def to_uint8(images: Tensor) -> Tensor:
    """Bring images in [-1, 1] to bytes 0..255."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def difference(reference: Tensor, quantized: Tensor) -> Tensor:
    """Return the difference of two sets of images in [-1, 1], times 4 around mid grey."""
    return ((quantized - reference) * (DIFFERENCE_GAIN / 2)).clamp(-1, 1)


def grid(images: Tensor, columns: int = 8, zoom: int = 1) -> Tensor:
    """Lay out images, shape (n, 3, H, W), row by row on white, GRID_GAP pixels apart; returns (H', W', 3) uint8."""
    pictures = to_uint8(images).repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    count, _, height, width = pictures.shape
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    sheet = torch.full(
        (rows * (height + GRID_GAP) - GRID_GAP, columns * (width + GRID_GAP) - GRID_GAP, 3), 255, dtype=torch.uint8
    )
    for place, picture in enumerate(pictures):
        top, left = place // columns * (height + GRID_GAP), place % columns * (width + GRID_GAP)
        sheet[top : top + height, left : left + width] = picture.permute(1, 2, 0)
    return sheet
