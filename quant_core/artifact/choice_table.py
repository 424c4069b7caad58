"""The table of choices: what each costs in the packed file, beside what it does (`quant_core.fit.sensitivity`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from kernels.packing import packed_size
from quant_core.artifact.size import kept_bytes, layer_bytes, tensor_bytes
from quant_core.fit.menu import promoted_channels
from quant_core.fit.sensitivity import Choices, Damage
from quant_core.fit.unit_state import UnitState
from quant_spec.enums import Granularity
from quant_spec.formats import LayerSpec
from quant_spec.numbers import significant
from quant_spec.tasks.sensitivity import Params


@dataclass(frozen=True, slots=True)
class Measured:
    """What the entries of a table are made from."""

    model: nn.Module
    choices: Choices
    damage: Damage
    errors: Mapping[str, Tensor]
    digits: int


def layer_entries(found: Measured, params: Params) -> dict[str, dict[str, Any]]:
    """Return the entries of the group's layers and attentions, by name."""
    entries: dict[str, dict[str, Any]] = {}
    for name, macs in params.layers.items():
        weights = {s.formats.layers[name].weight.bits: s for s in found.choices.weights if name in s.formats.layers}
        tables = [s for s in found.choices.activations if name in (*s.formats.layers, *s.formats.attentions)]
        fixed = params.fixed.get(name)
        chosen = {bits: s for bits, s in weights.items() if fixed is None or bits == fixed}
        entry: dict[str, Any] = {"weights": _weights(found, name, chosen, tables, params)}
        entry["activations"] = {
            str(bits): [significant(part) for part in damage.tolist()]
            for (layer, bits), damage in sorted(found.damage.activations.items(), key=lambda item: item[0][1])
            if layer == name
        }
        if weights:
            entry["keep"] = {"damage": 0.0, "bytes": kept_bytes(found.model, name, found.digits)}
        entry["parameters"] = found.model.get_parameter(f"{name}.weight").numel() if weights else 0
        entry["macs"] = macs
        entries[name] = entry
    return entries


def _weights(
    found: Measured, name: str, states: Mapping[int, UnitState], tables: Sequence[UnitState], params: Params
) -> dict[str, dict[str, float]]:
    """Return damage and bytes of each width, and of each share of promoted channels."""
    entries: dict[str, dict[str, float]] = {}
    widths = sorted(states)
    for bits in widths:
        spec = states[bits].formats.layers[name]
        own = states[bits].below(f"{name}.") | (tables[0].below(f"{name}.") if tables else {})
        damage = float(found.damage.weights[name, bits].sum())
        size = layer_bytes(name, spec, own, found.digits)
        entries[str(bits)] = {"damage": significant(damage), "bytes": size}
        above = next((width for width in widths if width > bits), None)
        if not params.promoted or above is None or spec.weight.granularity is not Granularity.PER_CHANNEL:
            continue
        low, high = found.errors[f"{name}:{bits}"].double(), found.errors[f"{name}:{above}"].double()
        for share in params.promoted:
            up = promoted_channels(low - high, share)
            if not up.any() or up.all():
                continue
            # Errors of output channels reach the prediction alike, so the damage falls as their power does.
            left = float(torch.where(up, high, low).sum() / low.sum().clamp(min=1e-30))
            columns = found.model.get_parameter(f"{name}.weight").numel() // len(up)
            mixed = _mixed_bytes(name, spec, own, up, above, columns, found.digits)
            entries[f"{bits}+{share:g}"] = {"damage": significant(damage * left), "bytes": mixed}
    return entries


def _mixed_bytes(
    name: str, spec: LayerSpec, own: Mapping[str, Tensor], up: Tensor, above: int, columns: int, digits: int
) -> int:
    """Return what a layer takes of which some channels are promoted."""
    promoted = int(up.sum())
    rows = (len(up) - promoted) * packed_size(columns, spec.weight.bits) + promoted * packed_size(columns, above)
    counts = ((spec.weight.bits, len(up) - promoted), (above, promoted))
    mixed = replace(spec, weight=replace(spec.weight, bits=above, mixture=counts))
    tensors = {
        **own,
        f"{name}.qweight": torch.empty(rows, dtype=torch.uint8),
        f"{name}.channel_bits": torch.empty(len(up), dtype=torch.uint8),
    }
    return layer_bytes(name, mixed, tensors, digits)


def attention_bytes(states: Sequence[UnitState], digits: int) -> int:
    """Return what the tables of attentions take; `states` of one width each."""
    total = 0
    for state in states:
        for name in state.formats.attentions:
            own = state.below(f"{name}.attention_quantizer.")
            total += sum(tensor_bytes(key, tensor, digits) for key, tensor in own.items())
    return total
