"""Quantize units without gradients: weight grids, nearest or closed-form rounding, measured activation ranges.

Inputs come from the full-precision model, so units do not depend on each other: any group of them takes one pass over
the calibration set, and groups run in parallel.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from kernels.fp8 import to_fp8
from quant_core.diffusion.calibration import CalibrationSet
from quant_core.fit.closed_form import Factor, factorize, round_closed_form, round_closed_form_fp8
from quant_core.fit.group_scales import integer_grid
from quant_core.fit.hessian import InputMoments, SecondMoment
from quant_core.fit.low_rank_branch import LowRankBranch
from quant_core.fit.observe import Observation, Watched, observe
from quant_core.fit.unit_state import UnitState, collect_state, merge_formats
from quant_core.nn.activation import ActivationQuantizer
from quant_core.nn.layers import QuantLayer, greatest_code, group_parts, scale_dtype, weight_matrix
from quant_core.nn.model import QuantizedParts, build_quantized
from quant_core.nn.ranges import QParams, choose_fp8_scale, choose_qparams
from quant_spec.enums import ActivationMode, Granularity, RangeMethod, RoundingMethod
from quant_spec.formats import SHIFT_DEPTH, ActivationSpec, LayerSpec, UnitFormat
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


def weight_grid(
    matrix: Tensor, spec: LayerSpec, group_index: Tensor, ranges: RangeSpec, bits: int | Tensor | None = None
) -> QParams:
    """Choose scales and zero points of a weight matrix (C_out, K), of shape (C_out, G) or (1, 1), and multipliers.

    Scales are what their stored dtype can hold, so that codes are chosen for the grid that is used. `bits`, shape
    (C_out,), where output channels have bits of their own.
    """
    bits = spec.weight.bits if bits is None else bits
    if spec.weight.is_float:
        return _fp8_grid(matrix, spec, group_index, ranges)
    if spec.weight.granularity is Granularity.PER_TENSOR:
        whole = choose_qparams(matrix.reshape(1, -1), spec.weight.bits, symmetric=spec.weight.symmetric, spec=ranges)
        return QParams(whole.scale[:, None], whole.zero_point[:, None])
    if spec.weight.is_multiplied:
        assert isinstance(bits, int), "channels with bits of their own have no groups"
        parts = group_parts(int(group_index.max()) + 1, spec)
        return integer_grid(matrix, bits, group_index, parts, ranges, symmetric=spec.weight.symmetric)
    grids = [
        _row_grids(matrix[:, group_index == group], bits, spec.weight.symmetric, ranges)
        for group in range(int(group_index.max()) + 1)
    ]
    scale = torch.stack([grid.scale for grid in grids], dim=1).to(scale_dtype(spec)).float()
    return QParams(scale, torch.stack([grid.zero_point for grid in grids], dim=1))


def _fp8_grid(matrix: Tensor, spec: LayerSpec, group_index: Tensor, ranges: RangeSpec) -> QParams:
    """Choose scales of E4M3 numbers; zero points are 0."""
    if spec.weight.granularity is Granularity.PER_TENSOR:
        whole = choose_fp8_scale(matrix.reshape(1, -1), ranges)
        return QParams(whole.scale[:, None], whole.zero_point[:, None])
    grids = [choose_fp8_scale(matrix[:, group_index == group], ranges) for group in range(int(group_index.max()) + 1)]
    return QParams(
        torch.stack([grid.scale for grid in grids], dim=1), torch.stack([grid.zero_point for grid in grids], dim=1)
    )


def _row_grids(rows: Tensor, bits: int | Tensor, symmetric: bool, ranges: RangeSpec) -> QParams:
    """Choose one grid for each row, of the same or of its own bits."""
    if isinstance(bits, int):
        return choose_qparams(rows, bits, symmetric=symmetric, spec=ranges)
    scale, zero_point = torch.empty(len(rows)), torch.empty(len(rows))
    for width in torch.unique(bits).tolist():
        own = bits == width
        grid = choose_qparams(rows[own], width, symmetric=symmetric, spec=ranges)
        scale[own], zero_point[own] = grid.scale.cpu(), grid.zero_point.cpu()
    return QParams(scale.to(rows.device), zero_point.to(rows.device))


def nearest_codes(matrix: Tensor, grid: QParams, bits: int | Tensor, group_index: Tensor) -> Tensor:
    """Return the nearest codes of a weight matrix, shape (C_out, K), dtype uint8; `bits` may be of each row."""
    scale, zero_point = grid.scale[:, group_index], grid.zero_point[:, group_index]
    codes = (torch.round(matrix / scale) + zero_point).clamp_(min=0)
    return torch.minimum(codes, torch.as_tensor(greatest_code(bits)).to(codes)).to(torch.uint8)


@dataclass(frozen=True, slots=True)
class RoundedLayer:
    """What rounding a layer's weight leaves at its output (of the weight, where there are no second moments).

    `sqnr_db`: signal-to-noise ratio in dB. `channel_errors`, shape (C_out,): error power of each output channel.
    """

    sqnr_db: float
    channel_errors: Tensor


def input_moments(layer: QuantLayer, seen: SecondMoment | None, config: RoundFit) -> InputMoments | None:
    """Return what closed-form rounding of a layer needs of its input; None where nothing was seen of it.

    With `correct_bias`, a layer that has a bias is rounded for the covariance of its input.
    """
    if seen is None:
        return None
    if config.correct_bias and layer.bias is not None:
        return InputMoments(seen.covariance(), seen.mean_row())
    return InputMoments(seen.mean())


def round_layer(
    layer: QuantLayer,
    weight: Tensor,
    moments: InputMoments | None,
    ranges: RangeSpec,
    damping: float,
    factor: Factor | None = None,
) -> RoundedLayer:
    """Set a layer's codes: the nearest, or those in closed form if moments of the input are given; and its bias.

    Parameters
    ----------
    weight : Tensor, shape of the weight, float32
        What codes are to stand for: in full precision, `QuantLayer.scaled` where the layer scales its input channels or
        has a low-rank branch.
    moments : InputMoments, optional
        Of the layer's input. With a mean, the layer's bias, which must be that of full precision, takes the mean error.
    damping : float
        Share of the mean diagonal of the second moments that is added to it.
    factor : Factor, optional
        Of these second moments with this damping, where several widths share it.
    """
    matrix, bits, groups = weight_matrix(weight.float()), layer.bits, layer.group_index.to(weight.device)
    grid = weight_grid(matrix, layer.spec, groups, ranges, bits)
    # A grouped convolution has one Hessian for each group of channels; such layers are small and rounded to nearest.
    moments = moments if moments is not None and len(moments.second) == matrix.shape[1] else None
    if factor is None and moments is not None:
        factor = factorize(moments.second, damping)
    if layer.spec.weight.is_float:
        scale = grid.scale[:, groups]
        numbers = to_fp8(matrix, scale) if factor is None else round_closed_form_fp8(matrix, factor, scale)
        layer.set_numbers(numbers, grid.scale)
    else:
        if factor is None:
            codes = nearest_codes(matrix, grid, bits, groups)
        else:
            codes = round_closed_form(matrix, factor, grid, bits, groups)
        layer.set_codes(codes, grid.scale, grid.zero_point, grid.multiplier)
    error = matrix - weight_matrix(layer.weight.float())
    if moments is not None and moments.mean is not None and layer.bias is not None:
        layer.bias += (error @ moments.mean).to(layer.bias)
    return _rounded(weight_matrix(layer.with_branch(weight.float())), error, moments)


def _rounded(matrix: Tensor, error: Tensor, moments: InputMoments | None) -> RoundedLayer:
    """Weigh an error of a weight matrix by the second moments of its input; what the bias takes is no error."""
    if moments is None:
        signal, noise = matrix.square(), error.square()
    else:
        signal, noise = (matrix @ moments.second) * matrix, (error @ moments.second) * error
    power = float(signal.sum())
    if moments is not None and moments.mean is not None:
        power += float((matrix @ moments.mean).square().sum())
    ratio = max(power, 1e-30) / float(noise.sum().clamp(min=1e-30))
    return RoundedLayer(10 * math.log10(ratio), noise.sum(dim=1))


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
