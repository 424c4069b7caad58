"""Second moments of a layer's input: the Hessian of its output error, and what an input that changed adds to it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def input_rows(layer: nn.Module, x: Tensor, positions: int | None, generator: torch.Generator) -> Tensor:
    """Return the rows that the layer's weight matrix multiplies, a convolution's through its unfolded input.

    Parameters
    ----------
    layer : nn.Module
        Conv1d, Conv2d, Linear (or a QuantLayer's geometry) with one group.
    x : Tensor
        The layer's input, (B, ..., C_in) for Linear, (B, C_in, *space) for a convolution.
    positions : int or None
        Output positions to draw per sample, the same for all samples of the batch; None takes all.

    Returns
    -------
    Tensor, shape (rows, K), dtype float32
        K = taps * C_in, channels last within a tap (`quant_core.layers.weight_matrix`).
    """
    kernel = getattr(layer, "kernel_size", None)
    if kernel is None:
        tokens = x.reshape(x.shape[0], -1, x.shape[-1])
        if positions is not None and positions < tokens.shape[1]:
            tokens = tokens[:, torch.randperm(tokens.shape[1], generator=generator)[:positions]]
        return tokens.reshape(-1, x.shape[-1]).float()
    padded = _pad(layer, x)
    windows = padded
    for dim, (size, step, dilation) in enumerate(zip(kernel, layer.stride, layer.dilation, strict=True)):
        windows = windows.unfold(dim + 2, dilation * (size - 1) + 1, step)[..., ::dilation]
    space = len(kernel)
    # (B, C, *out, *kernel) -> (B, out, taps, C)
    order = (0, *range(2, 2 + space), *range(2 + space, 2 + 2 * space), 1)
    windows = windows.permute(order)
    out = windows.shape[1 : 1 + space]
    total = int(torch.tensor(out).prod())
    chosen = torch.arange(total)
    if positions is not None and positions < total:
        chosen = torch.randperm(total, generator=generator)[:positions]
    index = torch.unravel_index(chosen, tuple(out))
    return windows[(slice(None), *index)].reshape(x.shape[0] * len(chosen), -1).float()


def _pad(layer: nn.Module, x: Tensor) -> Tensor:
    """Pad a convolution's input as the convolution does."""
    if layer.padding_mode != "zeros":
        return F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
    if isinstance(layer.padding, str):
        return F.pad(x, layer._reversed_padding_repeated_twice)
    return F.pad(x, [amount for size in reversed(layer.padding) for amount in (size, size)])


class SecondMoment:
    """Accumulates sum x x^T and the number of rows; exact under any order of batches up to float rounding."""

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        self.total = torch.zeros(columns, columns, device=device)
        self.rows = 0

    def update(self, rows: Tensor) -> None:
        """Add `rows`, shape (n, K), dtype float32."""
        self.total.addmm_(rows.T, rows)
        self.rows += len(rows)

    def mean(self) -> Tensor:
        """Return sum x x^T / rows, shape (K, K), dtype float32."""
        return self.total / max(1, self.rows)
