"""Other bits of layers' inputs: what they do at each trajectory step, and states that have them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from quant_core.diffusion.calibration import CalibrationSet, replay
from quant_core.fit.exchange import Exchange
from quant_core.fit.observe import Watched, observe
from quant_core.fit.unit_state import UnitState
from quant_core.inspect.prefix import Prefix
from quant_core.nn.steps import StepClock
from quant_spec.enums import RangeMethod, UnknownTimestep
from quant_spec.formats import SHIFT_DEPTH, ActivationSpec, LayerSpec
from quant_spec.ranges import RangeSpec

#: Calibration samples whose predictions are compared.
SAMPLES = 2


@torch.no_grad()
def measure_steps(
    model: nn.Module, calibration: CalibrationSet, states: Sequence[UnitState], names: Sequence[str]
) -> dict[str, Tensor]:
    """Measure what quantizing each layer's input alone does to the prediction of each step.

    Parameters
    ----------
    model : nn.Module
        In full precision.
    calibration : CalibrationSet
        Every step of the sampler's trajectory.
    states : sequence of UnitState
        Of the units that the layers lie in.
    names : sequence of str
        Layers.

    Returns
    -------
    dict of str to Tensor, shape (S,), float64
        Mean square difference of the prediction.
    """
    own = {name: state for state in states for name in state.formats.layers if name in names}
    clock = StepClock([float(t) for t in calibration.timesteps], UnknownTimestep.ERROR)
    exchange = Exchange(model, clock)
    prefix = Prefix(model, [], dict.fromkeys(names, ""))
    samples, steps = min(SAMPLES, calibration.samples), torch.arange(calibration.steps)
    found = {name: torch.zeros(calibration.steps, dtype=torch.float64) for name in names}
    for sample in range(samples):
        batch = calibration.gather(steps * calibration.samples + sample)
        clock.set_timestep(batch.timestep)
        given = prefix.record(lambda batch=batch: replay(model, batch))  # type: ignore[misc]
        for name in names:
            with prefix.before(name), exchange.quantized_input(own[name], name):
                error = replay(model, batch) - given
            found[name] += error.double().square().flatten(1).mean(1).cpu() / samples
    return found


def with_widths(
    model: nn.Module,
    calibration: CalibrationSet,
    states: Sequence[UnitState],
    widths: Mapping[str, Sequence[int]],
    ranges: Mapping[str, RangeSpec],
    *,
    batch_size: int,
    seed: int,
) -> list[UnitState]:
    """Return units' states with other bits of some layers' inputs, whose ranges are found for them.

    Codes of weights stay what they are, and so do scales and shifts of channels.

    Parameters
    ----------
    model : nn.Module
        The full-precision denoiser, which what layers read comes from.
    calibration : CalibrationSet
        Every step of the sampler's trajectory.
    states : sequence of UnitState
        Of all units that the layers lie in.
    widths : mapping of str to sequence of int, length S
        Bits at each step, by layer.
    ranges : mapping of str to RangeSpec
        How the range of an input is found, by layer.
    batch_size : int
        Calibration samples through the model at once.
    seed : int
        Of the values that ranges are found from.
    """
    specs: dict[str, LayerSpec] = {}
    scales: dict[str, Tensor] = {}
    for state in states:
        for name in widths.keys() & state.formats.layers.keys():
            spec = state.formats.layers[name]
            assert spec.activation is not None
            specs[name] = replace(spec, activation=_at_steps(spec.activation, widths[name]))
            if spec.channel_scale:
                parts = [state.tensors[f"{prefix}channel_scale"] for prefix in _quantizers(name, spec)]
                scales[name] = torch.cat(parts)
    keep_values = any(ranges[name].method is not RangeMethod.MINMAX for name in specs)
    watched = Watched(specs, (), (), None, None, keep_values, scales)
    seen = observe(model, calibration, list(specs), watched, batch_size=batch_size, seed=seed)
    made = []
    for state in states:
        tensors = dict(state.tensors)
        for name in specs.keys() & state.formats.layers.keys():
            spec = specs[name]
            assert spec.activation is not None
            for part, prefix in enumerate(_quantizers(name, spec)):
                grid = seen.ranges[name, part].qparams(spec.activation, ranges[name])
                tensors[f"{prefix}scale"] = grid.scale / (2**SHIFT_DEPTH if spec.channel_shift else 1)
                tensors[f"{prefix}zero_point"] = grid.zero_point
        layers = {name: specs.get(name, spec) for name, spec in state.formats.layers.items()}
        made.append(replace(state, formats=replace(state.formats, layers=layers), tensors=tensors))
    return made


def _at_steps(spec: ActivationSpec, widths: Sequence[int]) -> ActivationSpec:
    """Return a format with these bits at the steps."""
    differ = len(set(widths)) > 1
    return replace(spec, bits=max(widths), step_bits=tuple(widths) if differ else ())


def _quantizers(name: str, spec: LayerSpec) -> list[str]:
    """Return what the names of the tensors of each part of a layer's input begin with."""
    return [f"{name}.act_quantizers.{part}." for part in range(len(spec.split or (0,)))]
