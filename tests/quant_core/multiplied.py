"""Random grids of layers whose groups have multipliers."""

from __future__ import annotations

import torch
from torch import Tensor

from quant_core.fit.group_scales import most_multiplied
from quant_core.nn.layers import QuantLayer, exact_scale, group_parts
from quant_spec.enums import Granularity, GroupScale
from quant_spec.formats import WeightSpec


def multiplied(bits: int = 4, group_size: int = 32) -> WeightSpec:
    """Return a format with multipliers."""
    return WeightSpec(bits, granularity=Granularity.PER_GROUP, group_size=group_size, group_scale=GroupScale.INTEGER)


def random_grid(layer: QuantLayer, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Draw steps, zero points and multipliers as `set_codes` takes them; the first group's multipliers are greatest."""
    zero = torch.randint(0, 1 << layer.spec.weight.bits, layer.zero_point.shape, generator=generator)
    most = most_multiplied(zero.float(), layer.spec.weight.bits)
    multiplier = (torch.rand(most.shape, generator=generator) * most).floor() + 1
    multiplier[:, 0] = most[:, 0]
    channel = exact_scale(torch.rand(layer.scale.shape, generator=generator) * 0.005 + 0.001)
    return channel[:, group_parts(zero.shape[1], layer.spec)] * multiplier, zero, multiplier
