"""What is measured of one layer before the bits of its output channels are chosen: errors at three widths, kurtosis."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from safetensors.torch import load, save
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LayerErrors:
    """What is known of one layer.

    Attributes
    ----------
    bits : int
        N.
    columns : int
        Weights of each output channel.
    kurtosis : Tensor, shape (C_out,), dtype float64
    errors : Tensor, shape (C_out, 3), dtype float64
        Mean squared error of each channel's output at N - 1, N and N + 1 bits.
    effect : float
        Error power at the model's prediction per error power at this layer's output.
    """

    bits: int
    columns: int
    kurtosis: Tensor
    errors: Tensor
    effect: float

    @property
    def channels(self) -> int:
        """Number of output channels."""
        return len(self.kurtosis)

    @property
    def step(self) -> int:
        """Channels that candidates differ by."""
        return max(1, self.channels // 10)


def kurtosis(matrix: Tensor) -> Tensor:
    """Return the kurtosis of each row, mean((w - mu)^4) / sigma^4 with the unbiased sigma, shape (C_out,), float64.

    0 where all values are the same.
    """
    rows = matrix.double()
    if rows.shape[1] < 2:
        return torch.zeros(len(rows), dtype=torch.float64)
    sigma = rows.std(dim=1, keepdim=True)
    standard = (rows - rows.mean(dim=1, keepdim=True)) / torch.where(sigma > 0, sigma, 1.0)
    return standard.pow(4).mean(dim=1)


def to_bytes(layers: Mapping[str, LayerErrors]) -> bytes:
    """Serialise the measurements of some layers."""
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        tensors[f"{name}:kurtosis"], tensors[f"{name}:errors"] = layer.kurtosis, layer.errors.contiguous()
        numbers = [float(layer.bits), float(layer.columns), layer.effect]
        tensors[f"{name}:numbers"] = torch.tensor(numbers, dtype=torch.float64)
    return save(tensors)


def from_bytes(data: bytes) -> dict[str, LayerErrors]:
    """Read what `to_bytes` wrote, in alphabetical order of the layers."""
    tensors = load(data)
    layers = {}
    for name in sorted({key.rpartition(":")[0] for key in tensors}):
        bits, columns, effect = tensors[f"{name}:numbers"].tolist()
        errors, tails = tensors[f"{name}:errors"], tensors[f"{name}:kurtosis"]
        layers[name] = LayerErrors(int(bits), int(columns), tails, errors, effect)
    return layers
