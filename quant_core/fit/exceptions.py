"""Units of which parts are in full precision after all: their states with less in them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from quant_core.fit.rounding import trajectory
from quant_core.fit.unit_state import UnitState


def without_parts(state: UnitState, *, operands: Collection[str], layers: Collection[str]) -> UnitState:
    """Return a unit's state with some of its parts in full precision.

    Parameters
    ----------
    operands : collection of str
        Layers whose inputs, and attentions whose operands, are no longer quantized. Codes of a weight stay what they
        are; where they were chosen for an input with scaled channels, it is still divided by the scales.
    layers : collection of str
        Layers that are left as they were.
    """
    formats = state.formats
    specs = {
        name: replace(spec, activation=None, channel_shift=False) if name in operands else spec
        for name, spec in formats.layers.items()
        if name not in layers
    }
    attentions = {name: spec for name, spec in formats.attentions.items() if name not in operands}
    gone = tuple(f"{name}." for name in layers) + tuple(f"{name}.attention_quantizer." for name in operands)
    tables = tuple(f"{name}.act_quantizers." for name in operands)
    tensors = {
        name: tensor
        for name, tensor in state.tensors.items()
        if not name.startswith(gone) and (not name.startswith(tables) or name.endswith(".channel_scale"))
    }
    made = replace(formats, layers=specs, attentions=attentions)
    return UnitState(made, trajectory(made, state.timesteps), tensors)
