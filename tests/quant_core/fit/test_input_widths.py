"""Other bits of layers' inputs: what they do at each step, and states that have them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from quant_core.diffusion.calibration import CalibrationSet, replay
from quant_core.diffusion.denoiser import Denoiser
from quant_core.fit.input_widths import measure_steps, with_widths
from quant_core.fit.rounding import UnitRanges, round_units
from quant_core.fit.unit_state import UnitState, load_states, merge_formats
from quant_core.nn.model import build_quantized
from quant_spec.enums import RangeMethod
from quant_spec.formats import UnitFormat
from quant_spec.ranges import RangeSpec
from tests.quant_core.params import rounding

SEARCHED = RangeSpec(RangeMethod.MSE)
Made = tuple[Denoiser, CalibrationSet, list[tuple[UnitFormat, UnitRanges]]]


@pytest.fixture(scope="module")
def made(
    calibrated: Callable[..., tuple[Denoiser, CalibrationSet]],
    unit_formats: Callable[..., list[tuple[UnitFormat, UnitRanges]]],
) -> Made:
    """A tiny denoiser, and the formats of its units; the ranges of inputs are searched."""
    denoiser, calibration = calibrated("unet")
    units = [
        (formats, UnitRanges(ranges.weights, dict.fromkeys(ranges.activations, SEARCHED)))
        for formats, ranges in unit_formats(denoiser)
    ]
    return denoiser, calibration, units


def rounded(made: Made, bits: int) -> list[UnitState]:
    """States of all units with inputs of these bits, and scaled channels."""
    denoiser, calibration, units = made
    names = [name for formats, _ in units for name in formats.layers]
    scales = {n: torch.linspace(0.5, 2, denoiser.model.get_parameter(f"{n}.weight").shape[1]) for n in names}
    narrow = [(narrowed(formats, bits), ranges) for formats, ranges in units]
    found = round_units(copy.deepcopy(denoiser.model), calibration, narrow, rounding(), scales)
    return [each.state for each in found]


def narrowed(formats: UnitFormat, bits: int) -> UnitFormat:
    layers = {
        name: replace(spec, activation=None if spec.activation is None else replace(spec.activation, bits=bits))
        for name, spec in formats.layers.items()
    }
    return replace(formats, layers=layers)


def inputs_of(states: list[UnitState]) -> list[str]:
    return [name for state in states for name, spec in state.formats.layers.items() if spec.activation is not None]


def widened(made: Made, states: list[UnitState], widths: dict[str, tuple[int, ...]]) -> list[UnitState]:
    denoiser, calibration, _ = made
    ranges = dict.fromkeys(widths, SEARCHED)
    return with_widths(
        copy.deepcopy(denoiser.model), calibration, states, widths, ranges, batch_size=32, seed=rounding().seed
    )


def test_inputs_of_other_bits_are_what_rounding_at_these_bits_would_give(made: Made) -> None:
    states = rounded(made, 4)
    steps = made[1].steps
    wide = widened(made, states, {name: (6,) * steps for name in inputs_of(states)})
    for one, other in zip(wide, rounded(made, 6), strict=True):
        assert one.formats == other.formats
        assert one.timesteps == other.timesteps
        assert one.tensors.keys() == other.tensors.keys()
        assert all(torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items())


def test_steps_have_the_grids_of_their_bits_and_other_layers_what_they_had(made: Made) -> None:
    states = rounded(made, 4)
    name = inputs_of(states)[0]
    widths = tuple(8 if step == 0 else 4 for step in range(made[1].steps))
    (one, before, wide), *_ = [
        (one, before, wide)
        for one, before, wide in zip(widened(made, states, {name: widths}), states, rounded(made, 8), strict=True)
        if name in one.formats.layers
    ]
    spec = one.formats.layers[name].activation
    assert spec is not None
    assert (spec.bits, spec.step_bits) == (8, widths)
    key = f"{name}.act_quantizers.0.scale"
    assert one.tensors[key][0] == wide.tensors[key][0]
    assert torch.equal(one.tensors[key][1:], before.tensors[key][1:])
    others = {each: tensor for each, tensor in one.tensors.items() if not each.startswith(f"{name}.act_")}
    assert all(torch.equal(tensor, before.tensors[each]) for each, tensor in others.items())


def test_the_damage_of_a_step_is_that_of_a_model_in_which_this_input_alone_is_quantized(made: Made) -> None:
    denoiser, calibration, _ = made
    states = rounded(made, 4)
    name = inputs_of(states)[1]
    found = measure_steps(copy.deepcopy(denoiser.model), calibration, states, inputs_of(states))
    assert set(found) == set(inputs_of(states))
    model = copy.deepcopy(denoiser.model)
    parts = build_quantized(model, merge_formats(states))
    load_states(model, states)
    for each, layer in parts.layers.items():
        layer.soft_weight = layer.scaled(denoiser.model.get_parameter(f"{each}.weight").detach())
        for quantizer in layer.act_quantizers:
            quantizer.enabled = each == name  # type: ignore[assignment]
    for attention in parts.attentions.values():
        for operand in attention.operands:
            getattr(attention, operand).enabled = False
    samples = min(2, calibration.samples)
    with torch.no_grad():
        for step in range(calibration.steps):
            batch = calibration.rows(step, 0, samples)
            error = replay(model, batch) - replay(denoiser.model, batch)
            assert float(error.square().mean()) == pytest.approx(float(found[name][step]), rel=1e-3)
