"""Ranges of differences found in closed loop, and where differences are taken."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quant_core
from quant_core.artifact.folder import write_artifact
from quant_core.diffusion.calibration import CalibrationSet, replay
from quant_core.diffusion.denoiser import Denoiser
from quant_core.fit.rounding import UnitRanges, round_units
from quant_core.fit.step_gains import StepGains
from quant_core.fit.unit_state import UnitState, load_states, merge_formats
from quant_core.inspect.inspection import describe_layers, trace_model
from quant_core.methods.modiff.differences import MIB, DifferenceStates, fit_differences
from quant_core.metrics.cost import difference_state_bytes
from quant_core.metrics.sqnr import error_power
from quant_core.nn.layers import QuantLayer
from quant_core.nn.model import build_quantized
from quant_spec.enums import RangeMethod
from quant_spec.errors import QuantizationError
from quant_spec.formats import ActivationSpec, ModelFormat, UnitFormat
from quant_spec.quantization_config import quantization_config
from quant_spec.tasks.differences import Params
from tests.quant_core.params import rounding

Calibrated = Callable[..., tuple[Denoiser, CalibrationSet]]
ChooseFormats = Callable[..., list[tuple[UnitFormat, UnitRanges]]]
Rounded = tuple[Denoiser, CalibrationSet, list[UnitState]]


def rounded(denoiser: Denoiser, calibration: CalibrationSet, choose: ChooseFormats, **formats: Any) -> list[UnitState]:
    """States of all units, weights of 8 bits by default."""
    model = copy.deepcopy(denoiser.model)
    found = round_units(model, calibration, choose(denoiser, **{"bits": 8} | formats), rounding())
    return [each.state for each in found]


def names_of(states: list[UnitState]) -> tuple[str, ...]:
    return tuple(name for state in states for name in state.formats.layers)


def fitted(denoiser: Denoiser, calibration: CalibrationSet, states: list[UnitState], **params: Any) -> DifferenceStates:
    gains = params.pop("gains", None)
    params = {"layers": names_of(states), "seed": 0, "least_gain_db": 0.0, "by_effect": gains is not None} | params
    told = Params(**params)
    return fit_differences(copy.deepcopy(denoiser.model), calibration, states, told, gains)


def loaded(denoiser: Denoiser, states: list[UnitState]) -> nn.Module:
    model = copy.deepcopy(denoiser.model)
    build_quantized(model, merge_formats(states))
    load_states(model, states)
    return model.eval()


def noise_db(model: nn.Module, calibration: CalibrationSet, exact: Tensor) -> float:
    """Signal-to-noise ratio over the trajectory but for the first step, in dB."""
    signal, noise = error_power(model, calibration, exact, calibration.samples)[:, 1:].sum(1)
    return float(10 * torch.log10(signal / noise))


def predictions(model: nn.Module, calibration: CalibrationSet) -> Tensor:
    with torch.no_grad():
        return torch.stack(
            [replay(model, calibration.rows(s, 0, calibration.samples)) for s in range(calibration.steps)]
        )


@pytest.fixture(scope="module")
def unet(calibrated: Calibrated, unit_formats: ChooseFormats) -> Rounded:
    """A UNet with weights of 8 bits."""
    denoiser, calibration = calibrated("unet")
    return denoiser, calibration, rounded(denoiser, calibration, unit_formats)


@pytest.fixture(scope="module")
def changing(unet: Rounded) -> DifferenceStates:
    """The same in differences of 4 bits."""
    return fitted(*unet)


@pytest.mark.parametrize("family", ["unet", "dit"])
def test_differences_of_four_bits_beat_plain_codes_of_four(
    family: str, calibrated: Calibrated, unit_formats: ChooseFormats
) -> None:
    denoiser, calibration = calibrated(family)
    exact = predictions(denoiser.model, calibration)
    states = rounded(denoiser, calibration, unit_formats)
    found = fitted(denoiser, calibration, states, bits=4)
    plain = rounded(denoiser, calibration, unit_formats, activation=ActivationSpec(4), activation_range="mse")
    gain = noise_db(loaded(denoiser, found.states), calibration, exact) - noise_db(
        loaded(denoiser, plain), calibration, exact
    )
    assert gain > 3
    assert 0 < found.layers <= len(names_of(states))


def test_the_same_gives_the_same_and_the_artifact_runs_as_the_states_do(
    unet: Rounded, changing: DifferenceStates, tmp_path: Path
) -> None:
    denoiser, calibration, states = unet
    found, again = changing, fitted(denoiser, calibration, states)
    assert [state.to_bytes() for state in found.states] == [state.to_bytes() for state in again.states]
    assert [UnitState.from_bytes(state.to_bytes()).formats for state in found.states] == [
        state.formats for state in found.states
    ]
    model = loaded(denoiser, found.states)
    formats: ModelFormat = merge_formats(found.states)
    base = {**dict(denoiser.model.config), "_class_name": type(denoiser.model).__name__}
    write_artifact(model, base, quantization_config(formats), None, tmp_path / "packed")
    other = quant_core.load_quantized(tmp_path / "packed", backend="reference")
    assert torch.equal(predictions(model, calibration), predictions(other, calibration))
    assert difference_state_bytes(trace_model(denoiser), formats) == found.state_bytes


def test_grids_hold_what_is_left_over_and_what_layers_before_add(unet: Rounded) -> None:
    denoiser, calibration, states = unet
    found = fitted(denoiser, calibration, states, bits=3, range=RangeMethod.MINMAX)
    model = loaded(denoiser, found.states)
    clipped, seen = 0, 0

    def look(layer: QuantLayer, args: tuple[Tensor, ...]) -> None:
        nonlocal clipped, seen
        step = layer.clock.moment[1]
        if step not in layer.differences or layer.spec.split is not None:
            return
        held, _ = layer.memory.recall(layer.clock, args[0], "it")
        (quantizer,) = layer.act_quantizers
        steps = (args[0] - held) / quantizer.scale[step] + quantizer.zero_point[step]  # type: ignore[index, operator]
        # min-max of 8 of these very samples: nothing lies beyond the ends but by half a step of the zero point's
        clipped += int(((steps < -0.51) | (steps > 7.51)).sum())
        seen += steps.numel()

    for module in model.modules():
        if isinstance(module, QuantLayer):
            module.register_forward_pre_hook(look)  # type: ignore[arg-type]
    predictions(model, calibration)
    assert seen > 0
    assert clipped == 0


def test_where_a_difference_does_not_pay_the_step_stays_plain(unet: Rounded, changing: DifferenceStates) -> None:
    denoiser, calibration, states = unet
    counts = [changing, *(fitted(denoiser, calibration, states, least_gain_db=db) for db in (8.0, 1000.0))]
    assert counts[0].layers * counts[0].steps > counts[1].layers * counts[1].steps > 0
    assert (counts[2].layers, counts[2].state_bytes) == (0, 0)
    assert [state.to_bytes() for state in counts[2].states] == [state.to_bytes() for state in states]
    for spec in merge_formats(counts[1].states).layers.values():
        assert spec.activation is not None
        steps = spec.activation.differences
        widths = tuple(4 if step in steps else 8 for step in range(calibration.steps))
        assert spec.activation.step_bits == (widths if steps else ())


def test_ranges_of_steps_have_bits_of_their_own(unet: Rounded) -> None:
    denoiser, calibration, states = unet
    found = fitted(denoiser, calibration, states, range_bits=(8, 5, 3))
    widths = {
        spec.activation.step_bits
        for spec in merge_formats(found.states).layers.values()
        if spec.activation is not None and spec.activation.differences == (1, 2)
    }
    assert widths == {(8, 5, 3)}


def test_state_stays_within_its_budget(unet: Rounded, changing: DifferenceStates) -> None:
    denoiser, calibration, states = unet
    everything = changing
    budget = everything.state_bytes // 3
    some = fitted(denoiser, calibration, states, state_mib=budget / MIB)
    assert 0 < some.state_bytes <= budget
    assert 0 < some.layers < everything.layers


def test_scaled_channels_stay_scaled(calibrated: Calibrated, unit_formats: ChooseFormats) -> None:
    denoiser, calibration = calibrated("unet")
    exact = predictions(denoiser.model, calibration)
    formats = unit_formats(denoiser, bits=8)
    shapes = {n: denoiser.model.get_parameter(f"{n}.weight").shape[1] for f, _ in formats for n in f.layers}
    generator = torch.Generator().manual_seed(0)
    scales = {name: torch.exp(0.3 * torch.randn(count, generator=generator)) for name, count in shapes.items()}
    made = round_units(copy.deepcopy(denoiser.model), calibration, formats, rounding(), scales)
    found = fitted(denoiser, calibration, [each.state for each in made], bits=6)
    assert all(spec.channel_scale for spec in merge_formats(found.states).layers.values())
    assert noise_db(loaded(denoiser, found.states), calibration, exact) > 22


def test_layers_without_a_range_per_step_are_refused(calibrated: Calibrated, unit_formats: ChooseFormats) -> None:
    denoiser, calibration = calibrated("unet")
    states = rounded(denoiser, calibration, unit_formats, activation=replace(ActivationSpec(8), mode="static"))
    with pytest.raises(QuantizationError, match="with static ranges, wanted one for each of the 3 steps"):
        fitted(denoiser, calibration, states)


def weighted_bits(found: DifferenceStates, macs: dict[str, int]) -> tuple[float, list[float]]:
    """Mean bits of what layers read, and those of each step, weighted by multiplications."""
    steps = [0.0, 0.0, 0.0]
    for name, spec in merge_formats(found.states).layers.items():
        assert spec.activation is not None
        widths = spec.activation.step_bits or (spec.activation.bits,) * 3
        steps = [sum_ + macs[name] * bits for sum_, bits in zip(steps, widths, strict=True)]
    total = sum(macs[name] for name in merge_formats(found.states).layers)
    return sum(steps) / 3 / total, [each / total for each in steps]


@pytest.mark.parametrize("early", [True, False])
def test_bits_by_effect_go_where_an_error_shows_at_the_same_mean(unet: Rounded, early: bool) -> None:
    denoiser, calibration, states = unet
    macs = {name: told["macs"] for name, told in describe_layers(denoiser)["layers"].items()}
    weights = (1.0, 1.0, 1e-3) if early else (1.0, 1e-3, 1.0)
    gains = StepGains(tuple(calibration.timesteps.tolist()), weights, (1.0,) * 3, 1.0)
    alike = fitted(denoiser, calibration, states, bits=4)
    chosen = fitted(denoiser, calibration, states, bits=4, gains=gains)
    (mean, _), (own_mean, steps) = weighted_bits(alike, macs), weighted_bits(chosen, macs)
    assert own_mean <= mean + 1e-9
    assert own_mean > mean - 0.1
    exact = predictions(denoiser.model, calibration)
    before, after = (
        (predictions(loaded(denoiser, found.states), calibration) - exact).square().flatten(1).mean(1)
        for found in (alike, chosen)
    )
    if early:
        assert steps[1] > steps[2]
        assert float((after * torch.tensor(weights)).sum()) < 0.9 * float((before * torch.tensor(weights)).sum())
    # No step has more than one bit less, and the last keeps as many as it had: nothing smooths its error.
    for spec in merge_formats(chosen.states).layers.values():
        assert spec.activation is not None
        assert all(spec.activation.step_bits[step] >= 3 for step in spec.activation.differences)
        assert not spec.activation.differences or spec.activation.step_bits[-1] >= 4
    again = fitted(denoiser, calibration, states, bits=4, gains=gains)
    assert [state.to_bytes() for state in chosen.states] == [state.to_bytes() for state in again.states]
