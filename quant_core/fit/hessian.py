"""Second moments of a layer's input, which are the Hessian of its output error by its weight."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


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
    windows = _pad(layer, x)
    for dim, (size, step, dilation) in enumerate(zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)):
        windows = windows.unfold(dim + 2, dilation * (size - 1) + 1, step)[..., ::dilation]
    space = len(layer.kernel_size)
    # (B, C, *out, *kernel) -> (*out, B, *kernel, C)
    windows = windows.permute((*range(2, 2 + space), 0, *range(2 + space, 2 + 2 * space), 1))
    out = tuple(windows.shape[:space])
    total = math.prod(out)
    chosen = torch.arange(total)
    if positions is not None and positions < total:
        chosen = torch.randperm(total, generator=generator)[:positions]
    drawn = windows[torch.unravel_index(chosen, out)].transpose(0, 1)  # (B, positions, *kernel, C)
    return drawn.reshape(x.shape[0] * len(chosen), -1).float()


def _pad(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    """Pad a convolution's input as the convolution does."""
    if layer.padding_mode != "zeros":
        return F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
    if isinstance(layer.padding, str):
        return F.pad(x, layer._reversed_padding_repeated_twice)
    return F.pad(x, [amount for size in reversed(layer.padding) for amount in (size, size)])


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
        self.total = torch.zeros(columns, columns, device=device)
        self.sum = torch.zeros(columns, device=device)
        self.rows = 0

    def update(self, rows: Tensor) -> None:
        """Add `rows`, shape (n, K), dtype float32."""
        self.total.addmm_(rows.T, rows)
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
        return self.total / max(1, self.rows)
