"""Packed zero points and multipliers, which make an artifact smaller (docs/adr/0009-artifact-version-2.md).

The zero points of a layer with less than 8 bits, and multipliers, are packed as codes are (`kernels.packing`), row by
row, where that saves bytes: (C_out, ceil(G * bits / 8)) instead of (C_out, G). The shape says which it is.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from kernels.packing import pack_codes, packed_size, unpack_codes
from quant_core.nn.layers import QuantLayer
from quant_spec.formats import MULTIPLIER_BITS, WeightSpec


def grid_bits(model: nn.Module) -> dict[str, int]:
    """Return the bits of each tensor of zero points or multipliers that gets smaller when packed, by name."""
    found = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, QuantLayer):
            continue
        for part, width in packed_parts(layer.spec.weight).items():
            groups = layer.get_buffer(part).shape[1]
            if packed_size(groups, width) < groups:
                found[f"{name}.{part}"] = width
    return found


def packed_parts(spec: WeightSpec) -> dict[str, int]:
    """Return the bits of the tensors of a layer's grid that are packed where that saves bytes."""
    if spec.mixture or spec.is_float:
        return {}
    return {"zero_point": spec.bits} | ({"multiplier": MULTIPLIER_BITS} if spec.is_multiplied else {})


def pack_grids(tensors: dict[str, Tensor], bits: Mapping[str, int]) -> None:
    """Pack the tensors that `grid_bits` names, in place; ones that do not fit their bits stay."""
    for name, width in bits.items():
        if int(tensors[name].max()) < 1 << width:
            tensors[name] = pack_codes(tensors[name], width)


def unpack_grid(stored: Tensor, shape: tuple[int, ...], bits: int) -> Tensor:
    """Return zero points or multipliers of `shape`, packed or not in the file."""
    return stored if tuple(stored.shape) == shape else unpack_codes(stored, bits, shape[1])


def packed_shape(shape: tuple[int, ...], bits: int) -> tuple[int, ...]:
    """Return the shape of packed zero points or multipliers."""
    return shape[0], packed_size(shape[1], bits)
