"""Random quantized layers for kernel tests, in an artifact's layout."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.packing import pack_codes
from kernels.weights import PackedWeight, expand_weight_groups, pack_weight, weight_integers


@dataclass(frozen=True)
class Layer:
    """Codes (N, K) with their grid, and what `pack_weight` makes of them."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    packed: PackedWeight
    multiplier: Tensor | None = None

    def integers(self, channels: int, group_size: int | None) -> Tensor:
        """(code - zero_point) * multiplier by the definition of groups: consecutive channels of a tap; shape (N, K)."""
        k = torch.arange(self.codes.shape[1])
        per_tap = 1 if group_size is None else -(-channels // group_size)
        group = torch.zeros_like(k) if group_size is None else k // channels * per_tap + k % channels // group_size
        differences = self.codes.long() - self.zero_point.long()[:, group]
        return differences if self.multiplier is None else differences * self.multiplier.long()[:, group]


def random_layer(
    n: int,
    channels: int,
    *,
    bits: int,
    group_size: int | None = None,
    taps: int = 1,
    symmetric: bool = False,
    unit_scale: bool = False,
    channel: Tensor | None = None,
    multiplied: bool = False,
    device: str = "cpu",
) -> Layer:
    """Make a layer; with `unit_scale` every product of its kernels is a whole number; with multipliers if asked."""
    g = torch.Generator().manual_seed(n * 1000 + channels * 10 + bits)
    groups = 1 if group_size is None else taps * -(-channels // group_size)
    codes = torch.randint(0, 1 << bits, (n, taps * channels), generator=g, dtype=torch.uint8)
    codes[0], codes[-1] = 0, (1 << bits) - 1
    zero = torch.randint(0, 1 << bits, (n, groups), generator=g, dtype=torch.uint8)
    zero[0], zero[-1] = (1 << bits) - 1, 0  # the largest differences
    if symmetric:
        zero = torch.full_like(zero, 1 << (bits - 1))
    scale = torch.ones(n, groups) if unit_scale else torch.rand(n, groups, generator=g) * 0.1 + 0.01
    multiplier = None
    if multiplied:
        scale, top = scale[:, :1].bfloat16().float(), 2**bits - 1
        most = torch.minimum(128 // zero.int().clamp(min=1), 127 // (top - zero.int()).clamp(min=1)).clamp(max=16)
        multiplier = (torch.rand(n, groups, generator=g) * most).int() + 1
        multiplier[:, 0] = most[:, 0]
    elif group_size is not None:
        scale = scale.bfloat16()
    packed = pack_weight(
        pack_codes(codes, bits), scale, zero, bits=bits, channels=channels, taps=taps,
        group_size=group_size, channel=channel, multiplier=multiplier,
    )  # fmt: skip
    return Layer(codes, scale, zero, packed.to(device), multiplier)


def mixed_layer(
    channels: int, widths: tuple[int, ...], *, group_size: int | None = None, taps: int = 1, multiplied: bool = False
) -> tuple[PackedWeight, ...]:
    """Make a layer of 10 output channels for each of these bits, in no order; a record for each width."""
    order = torch.randperm(10 * len(widths), generator=torch.Generator().manual_seed(0))
    return tuple(
        random_layer(
            10, channels, bits=bits, group_size=group_size, taps=taps, channel=channel, multiplied=multiplied
        ).packed
        for bits, channel in zip(widths, order.split(10), strict=True)
    )


def weight_values(weight: PackedWeight) -> Tensor:
    """Return the dequantized weight, shape (N, taps, channels), dtype float32."""
    scale = weight.scale.float()
    scale = expand_weight_groups(scale, weight.layout) if weight.layout.has_group_scales else scale[:, :, None]
    return weight_integers(weight).float() * scale
