"""Round units once at each width of a menu, and put any choice among the widths together from what that gave.

Inputs come from the full-precision model, so what a layer becomes at some width does not depend on any other layer's
bits, nor on its own activation's: a mix is, byte for byte, what rounding at its bits would give. Where input channels
are scaled, it is what rounding with these scales would give.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from quant_core.diffusion.calibration import CalibrationSet
from quant_core.fit.closed_form import factorize
from quant_core.fit.layer_rounding import input_moments, round_layer
from quant_core.fit.observe import Observation, observe
from quant_core.fit.rounding import UnitRanges, mark_channels, set_ranges, trajectory, watch
from quant_core.fit.unit_state import UnitState, collect_state
from quant_core.nn.attention import AttentionQuantizer
from quant_core.nn.layers import QuantLayer
from quant_core.nn.model import QuantizedParts
from quant_core.nn.steps import StepClock
from quant_spec.enums import UnknownTimestep
from quant_spec.errors import QuantizationError
from quant_spec.formats import ActivationSpec, AttentionSpec, LayerSpec, UnitFormat
from quant_spec.steps import range_of_step
from quant_spec.tasks.menu import BASE, Params
from quant_spec.tasks.mix import MixedLayer, MixedUnit

#: Tensors of a layer's state below this name, and all of an attention's, are activation tables.
_TABLES = ".act_quantizers."


@dataclass(frozen=True, slots=True)
class MenuUnit:
    """A unit at each width.

    Attributes
    ----------
    weights : dict of int to UnitState
        Weights of the layers that have this width on their menu; formats have the base's activations.
    activations : dict of int or "base" to UnitState
        Activation tables of all layers and attentions; formats have the base's weights.
    errors : dict of str to Tensor, shape (C_out,), dtype float32
        By "layer:bits": error power at the layer's output that rounding leaves in each output channel.
    layer_sqnr_db : dict of str to dict of int to float
        Signal-to-noise ratio in dB that rounding each layer's weight to each width leaves at its output.
    """

    unit: str
    weights: dict[int, UnitState]
    activations: dict[int | str, UnitState]
    errors: dict[str, Tensor]
    layer_sqnr_db: dict[str, dict[int, float]]


def menu_widths(base: int, widths: Sequence[int]) -> list[int]:
    """Return the widths that a layer is rounded at: the menu's, and that of its base format."""
    return sorted({base, *widths})


def round_menu(
    model: nn.Module,
    calibration: CalibrationSet,
    units: Sequence[tuple[UnitFormat, UnitRanges]],
    config: Params,
    channel_scales: Mapping[str, Tensor] | None = None,
    channel_shifts: Mapping[str, Tensor] | None = None,
) -> list[MenuUnit]:
    """Round a group of units at each width, after one pass over the calibration set.

    Parameters
    ----------
    model : nn.Module
        The full-precision denoiser; left as it is.
    units : sequence of (UnitFormat, UnitRanges)
        In the base's formats, in the order in which they run.
    channel_scales, channel_shifts
        As for `round_units`.
    """
    scales, shifts = channel_scales or {}, channel_shifts or {}
    units = [(mark_channels(formats, scales, shifts), ranges) for formats, ranges in units]
    watched = watch([formats for formats, _ in units], [ranges for _, ranges in units], config, scales)
    names = [formats.unit for formats, _ in units]
    seen = observe(model, calibration, names, watched, batch_size=config.forward_batch_size, seed=config.seed)
    timesteps = tuple(float(t) for t in calibration.timesteps)
    made = []
    for formats, ranges in units:
        kitchen = _Kitchen(model, formats, ranges, seen, trajectory(formats, timesteps))
        weights, errors, sqnr = kitchen.weights(config, scales)
        activations = kitchen.activations(config.activation_bits, scales, shifts)
        made.append(MenuUnit(formats.unit, weights, activations, errors, sqnr))
    return made


class _Kitchen:
    """One unit, and what was seen of its inputs."""

    def __init__(
        self,
        model: nn.Module,
        formats: UnitFormat,
        ranges: UnitRanges,
        seen: Observation,
        timesteps: tuple[float, ...],
    ) -> None:
        self.model, self.formats, self.ranges, self.seen, self.timesteps = model, formats, ranges, seen, timesteps
        self.clock = StepClock(timesteps, UnknownTimestep.ERROR)

    def weights(
        self, config: Params, scales: Mapping[str, Tensor]
    ) -> tuple[dict[int, UnitState], dict[str, Tensor], dict[str, dict[int, float]]]:
        """Return states by width, errors by channel and signal-to-noise ratios."""
        layers: dict[int, dict[str, QuantLayer]] = {}
        errors: dict[str, Tensor] = {}
        sqnr: dict[str, dict[int, float]] = {}
        for name, spec in self.formats.layers.items():
            weight = self.model.get_parameter(f"{name}.weight").detach()
            moments = None
            factor = None
            for bits in menu_widths(spec.weight.bits, config.weight_bits):
                layer = self._layer(name, replace(spec, weight=spec.weight.with_bits(bits)), scales)
                scaled = layer.scaled(weight)
                if moments is None and name in self.seen.moments:
                    moments = input_moments(layer, self.seen.moments[name], config)
                if factor is None and moments is not None and len(moments.second) == layer.columns:
                    factor = factorize(moments.second, config.damping)
                rounded = round_layer(layer, scaled, moments, self.ranges.weights[name], config.damping, factor)
                layers.setdefault(bits, {})[name] = layer
                errors[f"{name}:{bits}"] = rounded.channel_errors.float().cpu()
                sqnr.setdefault(name, {})[bits] = rounded.sqnr_db
        states = {}
        for bits in sorted(layers):
            formats = replace(
                self.formats, layers={name: layer.spec for name, layer in layers[bits].items()}, attentions={}
            )
            state = collect_state(QuantizedParts(self.clock, layers[bits], {}), formats, self.timesteps)
            states[bits] = _part(state, tables=False)
        return states, errors, sqnr

    def activations(
        self, widths: Sequence[int], scales: Mapping[str, Tensor], shifts: Mapping[str, Tensor]
    ) -> dict[int | str, UnitState]:
        """Return states by width, and that of the base."""
        states: dict[int | str, UnitState] = {}
        wanted: list[int | str] = [BASE, *widths]
        for width in wanted:
            formats = self.formats if isinstance(width, str) else with_activation_bits(self.formats, width)
            layers = {name: self._layer(name, spec, scales) for name, spec in formats.layers.items()}
            device = next(self.model.parameters(), torch.empty(0)).device
            attentions = {
                name: AttentionQuantizer(spec, self.clock, device) for name, spec in formats.attentions.items()
            }
            parts = QuantizedParts(self.clock, layers, attentions)
            set_ranges(parts, formats, self.ranges, self.seen, shifts)
            states[width] = _part(collect_state(parts, formats, self.timesteps), tables=True)
        return states

    def _layer(self, name: str, spec: LayerSpec, scales: Mapping[str, Tensor]) -> QuantLayer:
        """Make the quantized layer, its codes still zero."""
        layer = QuantLayer(self.model.get_submodule(name), spec, self.clock)  # type: ignore[arg-type]
        if name in scales:
            layer.set_channel_scale(scales[name])
        return layer


def with_activation_bits(formats: UnitFormat, bits: int) -> UnitFormat:
    """Return the formats with these bits for all quantized inputs, and for all operands of attentions."""

    def narrowed(spec: ActivationSpec) -> ActivationSpec:
        return replace(spec, bits=bits, step_bits=())

    layers = {
        name: replace(spec, activation=None if spec.activation is None else narrowed(spec.activation))
        for name, spec in formats.layers.items()
    }
    attentions = {name: spec.with_bits(narrowed(spec.activation), bits) for name, spec in formats.attentions.items()}
    return replace(formats, layers=layers, attentions=attentions)


def _part(state: UnitState, *, tables: bool) -> UnitState:
    """Return a state with its activation tables alone, or with all else; both tell what channels are scaled by."""
    own = {name for layer in state.formats.layers for name in state.tensors if name.startswith(f"{layer}{_TABLES}")}
    own |= {name for name in state.tensors if ".attention_quantizer." in name}
    kept = {n: t for n, t in state.tensors.items() if (n in own) == tables or n.endswith(".channel_scale")}
    return replace(state, tensors=kept)


def mix_unit(
    choice: MixedUnit, weights: Sequence[UnitState], activations: Sequence[UnitState], errors: Mapping[str, Tensor]
) -> UnitState:
    """Put the state of one unit together.

    Parameters
    ----------
    choice : MixedUnit
    weights, activations : sequence of UnitState
        Those of this unit from the menu.
    errors : mapping of str to Tensor, shape (C_out,)
        As in `MenuUnit`, for layers of which channels are promoted.

    Raises
    ------
    QuantizationError
        If a width is chosen that none of the states has.
    """
    layers: dict[str, LayerSpec] = {}
    tensors: dict[str, Tensor] = {}
    for name, mixed in choice.layers.items():
        spec, own = _mixed_weight(name, mixed, weights, errors)
        tensors |= own
        if mixed.activations is None:
            layers[name] = replace(spec, activation=None)
            continue
        found = {
            state.formats.layers[name].activation.bits: state  # type: ignore[union-attr]
            for state in reversed(activations)
            if name in state.formats.layers
        }
        at = _states(f"layer {name}: activations", found, mixed.activations)
        base = at[0].formats.layers[name].activation
        assert base is not None
        layers[name] = replace(spec, activation=_by_range(base, mixed.activations, at[0].timesteps))
        tensors |= _mixed_tables(f"{name}{_TABLES}", at)
    attentions: dict[str, AttentionSpec] = {}
    for name, taken in choice.attentions.items():
        states = [state for state in reversed(activations) if name in state.formats.attentions]
        found = {state.formats.attentions[name].activation.bits: state for state in states}
        at = _states(f"attention {name}: activations", found, taken.activations)
        base = at[0].formats.attentions[name].activation
        softmax = {state.formats.attentions[name].softmax_bits: state for state in states}
        attentions[name] = AttentionSpec(_by_range(base, taken.activations, at[0].timesteps), taken.softmax)
        prefix = f"{name}.attention_quantizer."
        tensors |= _mixed_tables(prefix, at)
        probabilities = _states(f"attention {name}: softmax", softmax, [taken.softmax])[0]
        tensors |= probabilities.below(f"{prefix}probabilities.")
    timesteps = next((state.timesteps for state in (*weights, *activations)), ())
    formats = UnitFormat(choice.unit, layers, attentions)
    return UnitState(formats, trajectory(formats, timesteps), tensors)


def _states(what: str, found: Mapping[int, UnitState], widths: Sequence[int]) -> list[UnitState]:
    """Return the states of these widths, in order."""
    if missing := [bits for bits in widths if bits not in found]:
        raise QuantizationError(f"{what}: got {missing[0]} bits, wanted one of {', '.join(map(str, sorted(found)))}")
    return [found[bits] for bits in widths]


def _mixed_weight(
    name: str, mixed: MixedLayer, weights: Sequence[UnitState], errors: Mapping[str, Tensor]
) -> tuple[LayerSpec, dict[str, Tensor]]:
    """Return a layer's format and its tensors apart from activation tables."""
    found = {s.formats.layers[name].weight.bits: s for s in weights if name in s.formats.layers}
    low = _states(f"layer {name}: weights", found, [mixed.weights])[0]
    spec, tensors = low.formats.layers[name], low.below(f"{name}.")
    if mixed.promoted_bits is None:
        return spec, tensors
    high = _states(f"layer {name}: weights", found, [mixed.promoted_bits])[0].below(f"{name}.")
    gain = errors[f"{name}:{mixed.weights}"] - errors[f"{name}:{mixed.promoted_bits}"]
    up = promoted_channels(gain, mixed.promoted)
    if not up.any() or up.all():
        return (spec, tensors) if not up.any() else (found[mixed.promoted_bits].formats.layers[name], high)
    counts = ((mixed.weights, int((~up).sum())), (mixed.promoted_bits, int(up.sum())))
    for part in ("scale", "zero_point", "bias"):
        key = f"{name}.{part}"
        if key in tensors:
            rows = up if tensors[key].dim() == 1 else up[:, None]
            tensors[key] = torch.where(rows, high[key], tensors[key])
    codes = f"{name}.qweight"
    tensors[codes] = torch.cat([tensors[codes][~up].flatten(), high[codes][up].flatten()])
    bits = torch.where(up, mixed.promoted_bits, mixed.weights).to(torch.uint8)
    tensors[f"{name}.channel_bits"] = bits
    return replace(spec, weight=replace(spec.weight, bits=mixed.promoted_bits, mixture=counts)), tensors


def promoted_channels(gain: Tensor, share: float) -> Tensor:
    """Return which output channels are promoted, shape (C_out,), dtype bool.

    Those whose error power at the layer's output falls most, round(share * C_out) of them; each costs as many bytes,
    and errors of different channels meet the same layers behind. Of equals the first.

    Parameters
    ----------
    gain : Tensor, shape (C_out,)
        By how much the error power of each channel falls.
    """
    order = torch.argsort(gain, descending=True, stable=True)
    up = torch.zeros(len(gain), dtype=torch.bool)
    up[order[: round(share * len(gain))]] = True
    return up


def _mixed_tables(prefix: str, states: Sequence[UnitState]) -> dict[str, Tensor]:
    """Return activation tables of which each range of steps has its own state's rows."""
    tables = {name: tensor.clone() for name, tensor in states[0].below(prefix).items()}
    for name, tensor in tables.items():
        if name.endswith(".channel_scale"):
            continue  # of the layer, not of a step
        for step in range(len(tensor)):
            tensor[step] = states[range_of_step(step, len(tensor), len(states))].tensors[name][step]
    return tables


def _by_range(spec: ActivationSpec, widths: Sequence[int], timesteps: Sequence[float]) -> ActivationSpec:
    """Return the format with the bits of each range of steps."""
    if len(set(widths)) == 1:
        return replace(spec, bits=widths[0], step_bits=())
    steps = len(timesteps)
    bits = tuple(widths[range_of_step(step, steps, len(widths))] for step in range(steps))
    return replace(spec, bits=max(bits), step_bits=bits if len(set(bits)) > 1 else ())
