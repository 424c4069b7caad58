"""Packed zero points, which make an artifact smaller (docs/adr/0009-artifact-version-2.md).

The zero points of a layer with less than 8 bits are packed as its codes are (`kernels.packing`), row by row, where that
saves bytes: (C_out, ceil(G * bits / 8)) instead of (C_out, G). The shape says which it is.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from kernels.packing import pack_codes, packed_size, unpack_codes
from quant_core.nn.layers import QuantLayer


def zero_point_bits(model: nn.Module) -> dict[str, int]:
    """Return the bits of each zero-point tensor of `model` that gets smaller when packed, by name."""
    bits = {
        name: layer.spec.weight.bits
        for name, layer in model.named_modules()
        if isinstance(layer, QuantLayer) and not layer.spec.weight.mixture and not layer.spec.weight.is_float
    }
    return {
        f"{name}.zero_point": width
        for name, width in bits.items()
        if packed_size(groups := model.get_buffer(f"{name}.zero_point").shape[1], width) < groups
    }


def pack_zero_points(tensors: dict[str, Tensor], bits: Mapping[str, int]) -> None:
    """Pack the zero points that `zero_point_bits` names, in place; ones that do not fit their bits stay."""
    for name, width in bits.items():
        if int(tensors[name].max()) < 1 << width:
            tensors[name] = pack_codes(tensors[name], width)


def unpack_zero_points(stored: Tensor, shape: tuple[int, ...], bits: int) -> Tensor:
    """Return zero points of `shape`, packed or not in the file."""
    return stored if tuple(stored.shape) == shape else unpack_codes(stored, bits, shape[1])


def packed_shape(shape: tuple[int, ...], bits: int) -> tuple[int, ...]:
    """Return the shape of packed zero points."""
    return shape[0], packed_size(shape[1], bits)
