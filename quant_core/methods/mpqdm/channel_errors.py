"""Measure the error that each output channel makes at three widths, and what a layer's error does to the prediction."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product

import torch
from torch import Tensor, nn

from kernels.affine import fake_quantize_affine
from quant_core.diffusion.calibration import CalibrationSet, replay
from quant_core.diffusion.conditioning import seed_stream
from quant_core.fit.channel_scaling import ChannelScaling
from quant_core.fit.closed_form import Factor, factorize, round_closed_form
from quant_core.fit.hessian import input_rows
from quant_core.fit.layer_rounding import nearest_codes, weight_grid
from quant_core.fit.observe import Observation, Watched, observe, stop_after
from quant_core.fit.rounding import UnitRanges
from quant_core.methods.mpqdm.layer_errors import LayerErrors, kurtosis
from quant_core.nn.layers import greatest_code, weight_from_matrix, weight_groups, weight_matrix
from quant_core.nn.ranges import QParams
from quant_spec.enums import ActivationMode, RangeMethod, RoundingMethod
from quant_spec.formats import SHIFT_DEPTH, LayerSpec, UnitFormat
from quant_spec.ranges import RangeSpec
from quant_spec.tasks.channel_errors import Params

#: Calibration rows of each step on which a layer's effect is measured: that takes a whole forward for each layer.
EFFECT_SAMPLES = 2


@torch.no_grad()
def measure_units(
    model: nn.Module,
    calibration: CalibrationSet,
    units: Sequence[tuple[UnitFormat, UnitRanges]],
    names: Sequence[str],
    config: Params,
    scaling: ChannelScaling | None = None,
) -> dict[str, LayerErrors]:
    """Measure the layers `names` of a group of units.

    A grouped convolution is passed over: its channels read different inputs.

    Parameters
    ----------
    model : nn.Module
        The full-precision denoiser; left as it is.
    units : sequence of (UnitFormat, UnitRanges)
        Formats with uniform bits N.
    scaling : ChannelScaling, optional
        How input channels are scaled and shifted, of the layers where they are.
    """
    scaling = ChannelScaling() if scaling is None else scaling
    specs = {n: spec for formats, _ in units for n, spec in formats.layers.items() if n in names}
    specs = {n: spec for n, spec in specs.items() if getattr(model.get_submodule(n), "groups", 1) == 1}
    ranges = UnitRanges(
        {n: spec for _, own in units for n, spec in own.weights.items()},
        {n: spec for _, own in units for n, spec in own.activations.items()},
    )
    seen = _input_ranges(model, calibration, specs, ranges, config, scaling.scales)
    watched = {
        n: _MeasuredLayer(n, model.get_submodule(n), spec, ranges, seen, scaling, config) for n, spec in specs.items()
    }
    noises = {n: seed_stream(config.seed, f"positions of {n}") for n in specs}
    with stop_after(model, [formats.unit for formats, _ in units]) as call:
        last = min(config.samples, calibration.samples)
        for step, first in product(range(calibration.steps), range(0, last, config.forward_batch_size)):
            batch = calibration.rows(step, first, min(first + config.forward_batch_size, last))
            with _hooks(watched, step, config.positions, noises):
                call(lambda batch=batch: replay(model, batch))  # type: ignore[misc]
    rows = torch.arange(min(config.samples, EFFECT_SAMPLES, calibration.samples))
    index = (torch.arange(calibration.steps)[:, None] * calibration.samples + rows).flatten()
    batches = [calibration.gather(chunk) for chunk in index.split(config.forward_batch_size)]
    wanted = [replay(model, batch) for batch in batches]
    found = {}
    for name, layer in watched.items():
        with layer.replaced():
            pairs = zip(batches, wanted, strict=True)
            powers = [(replay(model, batch) - target).double().square().flatten(1).mean(1) for batch, target in pairs]
        found[name] = layer.result(float(torch.cat(powers).mean()))
    return found


def _input_ranges(
    model: nn.Module,
    calibration: CalibrationSet,
    specs: Mapping[str, LayerSpec],
    ranges: UnitRanges,
    config: Params,
    scales: Mapping[str, Tensor],
) -> Observation:
    """Measure the ranges of the layers' inputs, and the second moments that closed-form rounding needs."""
    static = {n: s for n, s in specs.items() if s.activation is not None and not s.activation.is_dynamic}
    moments = list(specs) if config.rounding is RoundingMethod.CLOSED_FORM else []
    if not static and not moments:
        return Observation({}, {})
    draws = any(ranges.activations[n].method is not RangeMethod.MINMAX for n in static)
    watched = Watched(static, (), moments, config.positions, samples=None, keep_values=draws, channel_scales=scales)
    names = list(dict.fromkeys([*static, *moments]))
    return observe(model, calibration, names, watched, batch_size=config.forward_batch_size, seed=config.seed)


class _MeasuredLayer:
    """One layer: its weight at three widths, and the errors that they make, as rows of its input come by.

    Where channels are scaled, what is quantized is x / channel_scale and weight * channel_scale; both are kept in the
    units of x and weight, so that products are the same.
    """

    def __init__(
        self,
        name: str,
        layer: nn.Module,
        spec: LayerSpec,
        ranges: UnitRanges,
        seen: Observation,
        scaling: ChannelScaling,
        config: Params,
    ) -> None:
        self.layer, self.spec = layer, spec
        self.channel_scale, self.channel_steps = scaling.scales.get(name), _channel_steps(scaling, name)
        self.original = layer.get_parameter("weight").data
        self.weight = weight_matrix(self.original.float())
        taps = self.weight.shape[1] // self.original.shape[1]
        self.column_scale = torch.ones(()) if self.channel_scale is None else self.channel_scale.repeat(taps)
        self.tables: list[QParams] = []
        if spec.activation is not None and not spec.activation.is_dynamic:
            parts = range(len(spec.split or (0,)))
            own = ranges.activations[name]
            self.tables = [seen.ranges[name, part].qparams(spec.activation, own) for part in parts]
        bits, moment = spec.weight.bits, seen.moments.get(name)
        self.bias = layer.bias if isinstance(layer.bias, Tensor) else None
        takes_mean = moment is not None and config.correct_bias and self.bias is not None
        self.mean = moment.mean_row() * self.column_scale.to(moment.sum) if takes_mean and moment is not None else None
        factor = None
        if moment is not None:
            factor = factorize(moment.covariance() if takes_mean else moment.mean(), config.damping)
        self.quantized = [self._quantized(width, ranges.weights[name], factor) for width in (bits - 1, bits, bits + 1)]
        self.errors = torch.zeros(len(self.weight), 3, dtype=torch.float64)
        self.weight_error, self.rows = 0.0, 0

    def _quantized(self, bits: int, ranges: RangeSpec, factor: Factor | None) -> Tensor:
        """Return the weight matrix rounded at some bits, as it will be."""
        groups = weight_groups(tuple(self.original.shape), self.spec).to(self.weight.device)
        width = torch.full((len(self.weight),), bits, dtype=torch.uint8)
        scaled = self.weight * self.column_scale
        grid = weight_grid(scaled, self.spec, groups, ranges, width)
        if factor is None:
            codes = nearest_codes(scaled, grid, width, groups)
        else:
            codes = round_closed_form(scaled, factor, grid, width, groups)
        return (codes.float() - grid.zero_point[:, groups]) * grid.scale[:, groups] / self.column_scale

    def _bias(self, quantized: Tensor) -> Tensor:
        """Return what the bias will add to take the mean error of a rounded weight matrix, shape (C_out,)."""
        return torch.zeros(()) if self.mean is None else (self.weight - quantized) @ self.mean

    def quantize_input(self, x: Tensor, step: int) -> Tensor:
        """Return the input as the layer will get it; in full precision where ranges are taken at run time."""
        if not self.tables or self.spec.activation is None:
            return x
        activation = self.spec.activation
        dim = -1 if isinstance(self.layer, nn.Linear) else 1
        at = step if activation.mode is ActivationMode.PER_STEP else 0
        bits = activation.step_bits[step] if activation.step_bits else activation.bits
        shape = (-1, *[1] * (x.dim() - 2)) if dim == 1 else (-1,)
        sizes, top = self.spec.split or (x.shape[dim],), int(greatest_code(bits))
        steps = None if self.channel_steps is None else self.channel_steps[at if len(self.channel_steps) > 1 else 0]
        own = [1.0] * len(sizes) if steps is None else [s.view(shape) for s in steps.split(sizes)]
        parts = zip(x.split(sizes, dim=dim), self.tables, own, strict=True)
        return torch.cat([fake_quantize_affine(p, t.scale[at] * c, t.zero_point[at], 0, top) for p, t, c in parts], dim)

    def add(self, x: Tensor, step: int, positions: int, generator: torch.Generator) -> None:
        """Add a batch of inputs."""
        rows = input_rows(self.layer, torch.cat([x.float(), self.quantize_input(x, step)]), positions, generator)
        exact, given = rows[: len(rows) // 2], rows[len(rows) // 2 :]
        target = exact @ self.weight.T
        for place, weight in enumerate(self.quantized):
            bias = self._bias(weight)
            self.errors[:, place] += (given @ weight.T + bias - target).double().square().sum(dim=0)
            if place == 1:
                self.weight_error += float((exact @ weight.T + bias - target).double().square().sum())
        self.rows += len(exact)

    @contextmanager
    def replaced(self) -> Iterator[None]:
        """Let the layer have its weight, and bias, at N bits."""
        parameter, bias = self.layer.get_parameter("weight"), self.bias
        parameter.data = weight_from_matrix(self.quantized[1], tuple(self.original.shape)).to(self.original)
        before = None if bias is None else bias.data
        if bias is not None:
            bias.data = bias.data + self._bias(self.quantized[1]).to(bias)
        try:
            yield
        finally:
            parameter.data = self.original
            if bias is not None and before is not None:
                bias.data = before

    def result(self, power: float) -> LayerErrors:
        """Return the measurement; `power` is the prediction's error with the weight at N bits."""
        own = max(self.weight_error / max(self.rows, 1), 1e-30)
        bits, columns = self.spec.weight.bits, self.weight.shape[1]
        return LayerErrors(
            bits, columns, kurtosis(self.weight * self.column_scale), self.errors / max(self.rows, 1), power / own
        )


def _channel_steps(scaling: ChannelScaling, name: str) -> Tensor | None:
    """Return the step of each input channel in units of its tensor's, (S, C_in) or (1, C_in); None if all have that."""
    scale, shift = scaling.scales.get(name), scaling.shifts.get(name)
    if scale is None and shift is None:
        return None
    steps = torch.ones(1, 1) if shift is None else torch.exp2(shift.float() - SHIFT_DEPTH)
    return steps if scale is None else steps * scale


@contextmanager
def _hooks(
    watched: Mapping[str, _MeasuredLayer], step: int, positions: int, noises: Mapping[str, torch.Generator]
) -> Iterator[None]:
    """Show the layers' inputs of one batch of a step to those that watch."""

    def hook(name: str) -> object:
        def see(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            watched[name].add(args[0], step, positions, noises[name])

        return see

    handles = [layer.layer.register_forward_pre_hook(hook(name)) for name, layer in watched.items()]  # type: ignore[arg-type]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
