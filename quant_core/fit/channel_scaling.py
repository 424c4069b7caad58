"""How input channels of layers are scaled and shifted, as one task chooses it and another uses it.

Stored as safetensors bytes; equal values give equal bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from safetensors.torch import load, save
from torch import Tensor

_SCALE, _SHIFT = ".channel_scale", ".channel_shift"


@dataclass(frozen=True, slots=True)
class ChannelScaling:
    """What input channels of layers are divided by, and the exponents of their quantization steps, by layer name.

    Attributes
    ----------
    scales : mapping of str to Tensor, shape (C_in,), dtype float32, > 0
    shifts : mapping of str to Tensor, shape (S, C_in), dtype uint8
        S is 1 for static ranges. From 0 to `quant_spec.formats.SHIFT_DEPTH`, which stands for the step without shifts.
    """

    scales: Mapping[str, Tensor] = field(default_factory=dict)
    shifts: Mapping[str, Tensor] = field(default_factory=dict)

    def of(self, layers: Sequence[str]) -> ChannelScaling:
        """Return the part of some layers."""
        return ChannelScaling(
            {name: self.scales[name] for name in layers if name in self.scales},
            {name: self.shifts[name] for name in layers if name in self.shifts},
        )

    def to_bytes(self) -> bytes:
        """Serialise."""
        tensors = {name + _SCALE: scale for name, scale in self.scales.items()}
        tensors |= {name + _SHIFT: shift for name, shift in self.shifts.items()}
        return save({name: tensors[name].contiguous() for name in sorted(tensors)})

    @classmethod
    def from_bytes(cls, parts: Sequence[bytes]) -> ChannelScaling:
        """Read and join what `to_bytes` wrote."""
        found = {name: tensor for part in parts for name, tensor in load(part).items()}
        return cls(
            {name.removesuffix(_SCALE): tensor for name, tensor in found.items() if name.endswith(_SCALE)},
            {name.removesuffix(_SHIFT): tensor for name, tensor in found.items() if name.endswith(_SHIFT)},
        )
