"""Quantize units without gradients: weight grids, nearest or closed-form rounding, measured activation ranges.

Inputs come from the full-precision model, so units do not depend on each other: any group of them takes one pass over
the calibration set, and groups run in parallel.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from quant_core.diffusion.calibration import CalibrationSet
from quant_core.fit.layer_rounding import input_moments, round_layer
from quant_core.fit.low_rank_branch import LowRankBranch
from quant_core.fit.observe import Observation, Watched, observe
from quant_core.fit.unit_state import UnitState, collect_state, merge_formats
from quant_core.nn.activation import ActivationQuantizer
from quant_core.nn.model import QuantizedParts, build_quantized
from quant_core.nn.ranges import QParams
from quant_spec.enums import ActivationMode, RangeMethod, RoundingMethod
from quant_spec.formats import SHIFT_DEPTH, ActivationSpec, UnitFormat
from quant_spec.passes.round import RoundFit
from quant_spec.planned import PlannedAttention, PlannedLayer, PlannedUnit
from quant_spec.ranges import RangeSpec
from quant_spec.tasks.round import Params


@dataclass(frozen=True, slots=True)
class UnitRanges:
    """How the ranges of a unit's weights and activations are found, by layer or attention name."""

    weights: Mapping[str, RangeSpec]
    activations: Mapping[str, RangeSpec]


@dataclass(frozen=True, slots=True)
class RoundedUnit:
    """A unit's state and, by layer, the signal-to-noise ratio in dB that rounding its weight leaves at its output."""

    state: UnitState
    layer_sqnr_db: dict[str, float]


def round_units(
    model: nn.Module,
    calibration: CalibrationSet,
    units: Sequence[tuple[UnitFormat, UnitRanges]],
    config: Params,
    channel_scales: Mapping[str, Tensor] | None = None,
    channel_shifts: Mapping[str, Tensor] | None = None,
    channel_bits: Mapping[str, Tensor] | None = None,
    branches: Mapping[str, LowRankBranch] | None = None,
) -> list[RoundedUnit]:
    """Quantize a group of units.

    Parameters
    ----------
    model : nn.Module
        The full-precision denoiser; its layers are replaced in place.
    units : sequence of (UnitFormat, UnitRanges)
        In the order in which they run.
    channel_scales : mapping of str to Tensor, shape (C_in,), optional
        What the input channels of some layers are divided by, and their weights multiplied with.
    channel_shifts : mapping of str to Tensor, shape (S, C_in) or (1, C_in), dtype uint8, optional
        Exponents of the channels' activation steps: SHIFT_DEPTH stands for the measured range, less for a finer step.
    channel_bits : mapping of str to Tensor, shape (C_out,), dtype uint8, optional
        Bits of the output channels of some layers, in place of the format's.
    branches : mapping of str to LowRankBranch, optional
        What is added beside the codes of some layers, which are then those of what is left.

    Returns
    -------
    list of RoundedUnit, one for each unit
    """
    timesteps = tuple(float(t) for t in calibration.timesteps)
    scales, shifts, mixed, beside = channel_scales or {}, channel_shifts or {}, channel_bits or {}, branches or {}
    units = [(mix_channels(mark_channels(formats, scales, shifts), mixed), ranges) for formats, ranges in units]
    units = [(mark_branches(formats, beside), ranges) for formats, ranges in units]
    watched = watch([formats for formats, _ in units], [ranges for _, ranges in units], config, scales)
    names = [formats.unit for formats, _ in units]
    seen = observe(model, calibration, names, watched, batch_size=config.forward_batch_size, seed=config.seed)
    # modules, not weights: those of a streamed model are read one at a time
    originals = {name: model.get_submodule(name) for formats, _ in units for name in formats.layers}
    blank = [UnitState(formats, trajectory(formats, timesteps), {}) for formats, _ in units]
    parts = build_quantized(model, merge_formats(blank))
    results = []
    for (formats, ranges), state in zip(units, blank, strict=True):
        sqnr = {}
        for name in formats.layers:
            layer = parts.layers[name]
            if name in scales:
                layer.set_channel_scale(scales[name])
            if layer.spec.weight.mixture:
                layer.set_channel_bits(mixed[name])
            if name in beside:
                layer.set_branch(beside[name].down, beside[name].up)
            moments = input_moments(layer, seen.moments.get(name), config)
            scaled = layer.scaled(originals[name].get_parameter("weight").detach())
            sqnr[name] = round_layer(layer, scaled, moments, ranges.weights[name], config.damping).sqnr_db
        set_ranges(parts, formats, ranges, seen, shifts)
        results.append(RoundedUnit(collect_state(parts, formats, state.timesteps), sqnr))
    return results


def mark_channels(formats: UnitFormat, scaled: Container[str], shifted: Container[str]) -> UnitFormat:
    """Return the formats with `channel_scale` and `channel_shift` for those layers."""
    layers = {
        name: replace(spec, channel_scale=name in scaled, channel_shift=name in shifted)
        for name, spec in formats.layers.items()
    }
    return replace(formats, layers=layers)


def mark_branches(formats: UnitFormat, branches: Mapping[str, LowRankBranch]) -> UnitFormat:
    """Return the formats with the ranks of these branches."""
    layers = {
        name: replace(spec, low_rank=branches[name].rank) if name in branches else spec
        for name, spec in formats.layers.items()
    }
    return replace(formats, layers=layers)


def trajectory(formats: UnitFormat, timesteps: tuple[float, ...]) -> tuple[float, ...]:
    """Return the timesteps if any table of the unit is per step."""
    modes = [spec.activation.mode for spec in formats.layers.values() if spec.activation is not None]
    modes += [spec.activation.mode for spec in formats.attentions.values()]
    return timesteps if ActivationMode.PER_STEP in modes else ()


def mix_channels(formats: UnitFormat, channel_bits: Mapping[str, Tensor]) -> UnitFormat:
    """Return the formats with the bits of `channel_bits`: a `mixture` where a layer's channels differ."""
    layers = dict(formats.layers)
    for name in layers.keys() & channel_bits.keys():
        widths, counts = torch.unique(channel_bits[name], return_counts=True)
        mixture = tuple(zip(widths.tolist(), counts.tolist(), strict=True))
        weight = replace(layers[name].weight, bits=mixture[-1][0], mixture=mixture if len(mixture) > 1 else ())
        layers[name] = replace(layers[name], weight=weight)
    return replace(formats, layers=layers)


def watch(
    units: Sequence[UnitFormat], ranges: Sequence[UnitRanges], config: RoundFit, scales: Mapping[str, Tensor]
) -> Watched:
    """Say what has to be seen of these units."""
    layers = {name: spec for unit in units for name, spec in unit.layers.items()}
    needs_range = {name: spec for name, spec in layers.items() if _is_measured(spec.activation)}
    attentions = [name for unit in units for name, spec in unit.attentions.items() if _is_measured(spec.activation)]
    # Second moments weigh errors in the report too, but only closed-form rounding pays for all of them.
    moments = list(layers) if config.method is RoundingMethod.CLOSED_FORM else []
    methods = {spec.method for each in ranges for spec in each.activations.values()}
    keep_values = methods != {RangeMethod.MINMAX}
    return Watched(needs_range, attentions, moments, config.positions, config.samples, keep_values, scales)


def _is_measured(spec: ActivationSpec | None) -> bool:
    return spec is not None and not spec.is_dynamic


def set_ranges(
    parts: QuantizedParts,
    formats: UnitFormat,
    ranges: UnitRanges,
    seen: Observation,
    shifts: Mapping[str, Tensor],
) -> None:
    """Fill the activation tables of a unit from what was observed."""
    for name, spec in formats.layers.items():
        if spec.activation is None or not _is_measured(spec.activation):
            continue
        for part, quantizer in enumerate(parts.layers[name].act_quantizers):
            assert isinstance(quantizer, ActivationQuantizer)
            grid = seen.ranges[name, part].qparams(spec.activation, ranges.activations[name])
            quantizer.set_qparams(QParams(grid.scale / 2**SHIFT_DEPTH, grid.zero_point) if name in shifts else grid)
        if name in shifts:
            parts.layers[name].set_channel_shift(shifts[name])
    for name, attention in formats.attentions.items():
        if not _is_measured(attention.activation):
            continue
        for operand in parts.attentions[name].operands:
            quantizer = getattr(parts.attentions[name], operand)
            quantizer.set_qparams(seen.ranges[name, operand].qparams(quantizer.spec, ranges.activations[name]))


def read_unit(planned: PlannedUnit, step_bits: Sequence[int] | None = None) -> tuple[UnitFormat, UnitRanges]:
    """Return the format of a planned unit, and how its ranges are found.

    `step_bits`: the bits of each trajectory step, for activations whose bits are open.
    """
    formats = UnitFormat(
        planned.unit,
        {name: layer.spec(step_bits) for name, layer in planned.layers.items()},
        {name: attention.spec() for name, attention in planned.attentions.items()},
    )
    parts: list[tuple[str, PlannedLayer | PlannedAttention]] = [*planned.layers.items(), *planned.attentions.items()]
    activations = {name: part.activation_range for name, part in parts if part.activation_range is not None}
    return formats, UnitRanges({name: layer.weight_range for name, layer in planned.layers.items()}, activations)
