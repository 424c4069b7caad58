"""The state of one quantized unit: codes, grids and activation tables under the names that they have in the artifact.

Stored as safetensors bytes; equal states give equal bytes. A packed model is the union of its units' states.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from safetensors.torch import load, save
from torch import Tensor, nn

from quant_core.nn.model import QuantizedParts
from quant_spec.documents import read_json
from quant_spec.enums import UnknownTimestep
from quant_spec.formats import ModelFormat, UnitFormat


@dataclass(frozen=True, slots=True)
class UnitState:
    """A unit's format, the trajectory of its per-step tables, its tensors by their names in the model's state dict."""

    formats: UnitFormat
    timesteps: tuple[float, ...]
    tensors: Mapping[str, Tensor]

    def to_bytes(self) -> bytes:
        """Serialise."""
        head = {**self.formats.to_json(), "timesteps": list(self.timesteps)}
        tensors = {name: self.tensors[name].detach().cpu().contiguous() for name in sorted(self.tensors)}
        return save(tensors, {"unit_state": json.dumps(head, sort_keys=True)})

    def below(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors whose names begin so."""
        return {name: tensor for name, tensor in self.tensors.items() if name.startswith(prefix)}

    @classmethod
    def from_bytes(cls, data: bytes) -> UnitState:
        """Read what `to_bytes` wrote."""
        size = int.from_bytes(data[:8], "little")
        head = read_json(read_json(data[8 : 8 + size], "unit state")["__metadata__"]["unit_state"], "unit state")
        return cls(UnitFormat.from_json(head), tuple(head["timesteps"]), load(data))


def merge_formats(states: list[UnitState], unknown_timestep: UnknownTimestep = UnknownTimestep.ERROR) -> ModelFormat:
    """Return the format of a model in which all of these units are quantized.

    Timesteps are stored only if some table is per step.
    """
    layers = {name: spec for state in states for name, spec in state.formats.layers.items()}
    attentions = {name: spec for state in states for name, spec in state.formats.attentions.items()}
    trajectories = {state.timesteps for state in states if state.timesteps}
    assert len(trajectories) <= 1, f"states of one job come from one trajectory, got {len(trajectories)}"
    features = {name: spec for state in states for name, spec in state.formats.features.items()}
    unserved = tuple(name for state in states for name in state.formats.unserved)
    return ModelFormat(layers, attentions, next(iter(trajectories), ()), unknown_timestep, features, unserved)


def collect_state(parts: QuantizedParts, formats: UnitFormat, timesteps: tuple[float, ...]) -> UnitState:
    """Take a unit's tensors out of a quantized model."""
    tensors: dict[str, Tensor] = {}
    for name in formats.layers:
        tensors |= _prefixed(name, parts.layers[name])
    for name in formats.features:
        tensors |= _prefixed(name, parts.features[name])
    for name in formats.attentions:
        tensors |= _prefixed(f"{name}.attention_quantizer", parts.attentions[name])
    return UnitState(formats, timesteps, tensors)


def load_states(model: nn.Module, states: list[UnitState]) -> None:
    """Copy the tensors of `states` into a model that `build_quantized` prepared with their formats."""
    own = model.state_dict(keep_vars=True)
    for state in states:
        for name, tensor in state.tensors.items():
            own[name].data.copy_(tensor)


def _prefixed(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in module.state_dict().items()}
