"""Second moments of a layer's input, which are the Hessian of its output error by its weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Columns of a second moment that are summed together.
_COLUMNS = 512


def input_rows(layer: nn.Module, x: Tensor, positions: int | None, generator: torch.Generator) -> Tensor:
    """Return the rows that the layer's weight matrix multiplies, a convolution's through its unfolded input.

    Parameters
    ----------
    layer : nn.Module
        Linear, Conv1d, Conv2d or Conv3d with one group.
    x : Tensor
        The layer's input, (B, ..., C_in) for Linear, (B, C_in, *space) for a convolution.
    positions : int or None
        Output positions to draw per sample, the same for all samples of the batch; None takes all.

    Returns
    -------
    Tensor, shape (rows, K), dtype float32
        K = taps * C_in, channels last within a tap (`quant_core.nn.layers.weight_matrix`).
    """
    if not isinstance(layer, _CONVOLUTIONS):
        tokens = x.reshape(x.shape[0], -1, x.shape[-1])
        if positions is not None and positions < tokens.shape[1]:
            tokens = tokens[:, torch.randperm(tokens.shape[1], generator=generator)[:positions]]
        return tokens.reshape(-1, x.shape[-1]).float()
    padded = _pad(layer, x)  # (B, *space, C)
    starts, taps = _windows(layer, padded.shape[1:-1])
    if positions is not None and positions < len(starts):
        starts = starts[torch.randperm(len(starts), generator=generator)[:positions]]
    # Whole rows of channels are copied, one for each tap.
    chosen = (starts[:, None] + taps).flatten().to(x.device)
    drawn = padded.reshape(x.shape[0], -1, padded.shape[-1]).index_select(1, chosen)  # (B, positions * taps, C)
    return drawn.reshape(x.shape[0] * len(starts), -1).float()


def output_rows(layer: nn.Module, y: Tensor, positions: int | None, generator: torch.Generator) -> Tensor:
    """Return what a layer gives for the rows that `input_rows` draws with an equal generator, shape (rows, C_out).

    Parameters
    ----------
    y : Tensor
        The layer's output, (B, ..., C_out) for Linear, (B, C_out, *space) for a convolution.
    """
    return input_rows(nn.Identity(), y.movedim(1, -1) if isinstance(layer, _CONVOLUTIONS) else y, positions, generator)


def _windows(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, space: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return where a convolution's windows start in a flat padded space, and where its taps are from there."""
    starts, taps = torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long)
    for extent, size, step, gap in zip(space, layer.kernel_size, layer.stride, layer.dilation, strict=True):
        first = torch.arange(0, extent - gap * (size - 1), step)
        starts = (starts[:, None] * extent + first).flatten()
        taps = (taps[:, None] * extent + gap * torch.arange(size)).flatten()
    return starts, taps


def _pad(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    """Pad a convolution's input as the convolution does, and put its channels last."""
    if layer.padding_mode != "zeros":
        return F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode).movedim(1, -1)
    amounts = layer._reversed_padding_repeated_twice
    if not isinstance(layer.padding, str):
        amounts = [amount for size in reversed(layer.padding) for amount in (size, size)]
    return F.pad(x.movedim(1, -1), [0, 0, *amounts])


@dataclass(frozen=True, slots=True)
class InputMoments:
    """What closed-form rounding needs to know of a layer's input x, whose rows have K elements.

    Attributes
    ----------
    second : Tensor, shape (K, K), float32
        Weighs the error of the weight: E[x x^T]; or where the bias takes the mean error, the covariance of x.
    mean : Tensor, shape (K,), float32, or None
        E[x], where the bias takes the mean error.
    """

    second: Tensor
    mean: Tensor | None = None


class SecondMoment:
    """Accumulates sum x x^T, sum x and the number of rows; exact under any order of batches up to float rounding."""

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        # Of the sum, which is symmetric, what lies below the diagonal's blocks of columns and in them.
        self._lower = torch.zeros(columns, columns, device=device)
        self.sum = torch.zeros(columns, device=device)
        self.rows = 0

    def update(self, rows: Tensor) -> None:
        """Add `rows`, shape (n, K), dtype float32."""
        for first in range(0, rows.shape[1], _COLUMNS):
            block = slice(first, first + _COLUMNS)
            self._lower[first:, block].addmm_(rows[:, first:].T, rows[:, block])
        self.sum += rows.sum(dim=0)
        self.rows += len(rows)

    def mean_row(self) -> Tensor:
        """Return sum x / rows, shape (K,), dtype float32."""
        return self.sum / max(1, self.rows)

    def covariance(self) -> Tensor:
        """Return sum (x - mean) (x - mean)^T / rows, shape (K, K), dtype float32."""
        mean = self.mean_row()
        return self.mean() - torch.outer(mean, mean)

    def mean(self) -> Tensor:
        """Return sum x x^T / rows, shape (K, K), dtype float32."""
        lower = self._lower.tril()
        return (lower + lower.tril(-1).T) / max(1, self.rows)
