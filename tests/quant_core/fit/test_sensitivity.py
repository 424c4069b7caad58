"""Damages are those of forwards in which one layer is changed, over families of denoisers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quant_core.diffusion.calibration import CalibrationSet, replay
from quant_core.diffusion.denoiser import Denoiser
from quant_core.fit.menu import MenuUnit, round_menu
from quant_core.fit.sensitivity import PATHS, Choices, interpolated, measure, trajectory_rows
from quant_core.fit.step_gains import StepGains, measure_gains
from quant_core.fit.unit_state import UnitState, load_states, merge_formats
from quant_core.nn.model import build_quantized
from quant_spec.sampler import Sampler
from quant_spec.tasks.menu import BASE, Params

FAMILIES = ("unet", "sd3")
STEPS = [0, 2]
SAMPLER = Sampler(num_inference_steps=3)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def made(
    family: str, calibrated: Callable[..., tuple[Denoiser, CalibrationSet]], unit_formats: Callable[..., Any]
) -> tuple[Denoiser, CalibrationSet, list[MenuUnit]]:
    """A tiny denoiser, its calibration set, and its menu of 2 and 4 bits."""
    denoiser, calibration = calibrated(family)
    config = Params(seed=0, forward_batch_size=4, weight_bits=(2, 4), units=())
    return denoiser, calibration, round_menu(denoiser.model, calibration, unit_formats(denoiser), config)


def weights_of(denoiser: Denoiser, states: list[UnitState]) -> dict[str, Tensor]:
    """Return weights as packed layers hold them; the denoiser's layers are replaced."""
    parts = build_quantized(denoiser.model, merge_formats(states))
    load_states(denoiser.model, states)
    return {name: layer.weight for name, layer in parts.layers.items()}


def changed(model: nn.Module, weights: dict[str, Tensor], share: float, layer: str, own: Tensor | None) -> nn.Module:
    """Give all layers but one a share of their error, and that one a weight of its own, or its exact one."""
    for name, rounded in weights.items():
        parameter = model.get_parameter(f"{name}.weight")
        if name != layer:
            parameter.data = torch.lerp(parameter.data, rounded, share)
        elif own is not None:
            parameter.data = own
    return model


@pytest.mark.parametrize("points", [0, 2])
def test_a_weights_damage_is_the_power_of_its_own_change_in_context(
    made: tuple[Denoiser, CalibrationSet, list[MenuUnit]],
    calibrated: Callable[..., tuple[Denoiser, CalibrationSet]],
    family: str,
    points: int,
) -> None:
    denoiser, calibration, menu = made
    context = [unit.weights[4] for unit in menu if unit.weights]
    choices = Choices([state for unit in menu for state in unit.weights.values()], [])
    units = [unit.unit for unit in menu]
    before = {name: value.clone() for name, value in denoiser.model.state_dict().items()}
    options: dict[str, Any] = {"path": PATHS[points], "steps": STEPS, "rows": 2, "batch_size": 3}
    found = measure(denoiser.model, calibration, units, context, choices, **options)
    assert all(torch.equal(value, before[name]) for name, value in denoiser.model.state_dict().items())
    layers = [name for unit in menu for name in unit.weights.get(2, unit.weights[4]).formats.layers]
    assert found.weights.keys() == {(name, bits) for name in layers for bits in (2, 4)}
    low, mid = (weights_of(calibrated(family)[0], [u.weights[bits] for u in menu if u.weights]) for bits in (2, 4))
    batch = calibration.gather(trajectory_rows(calibration, STEPS, 2))
    for name in (layers[1], layers[len(layers) // 2], layers[-1]):
        powers = torch.zeros(2, dtype=torch.float64)
        for share in PATHS[points]:
            exact, worse = (
                replay(changed(calibrated(family)[0].model, mid, share, name, own), batch) for own in (None, low[name])
            )
            powers += (worse - exact).double().square().flatten(1).mean(1).reshape(2, 2).mean(1) / len(PATHS[points])
        assert torch.allclose(found.weights[name, 2][STEPS], powers, rtol=1e-3)
        assert found.weights[name, 2][1] == pytest.approx(float(powers.mean()), rel=1e-3)  # in between


def test_an_inputs_damage_is_that_of_quantizing_it_alone(
    made: tuple[Denoiser, CalibrationSet, list[MenuUnit]],
    calibrated: Callable[..., tuple[Denoiser, CalibrationSet]],
    family: str,
) -> None:
    denoiser, calibration, menu = made
    choices = Choices([], [unit.activations[BASE] for unit in menu])
    units = [unit.unit for unit in menu]
    options: dict[str, Any] = {"path": PATHS[0], "steps": STEPS, "rows": 2, "batch_size": 8}
    found = measure(denoiser.model, calibration, units, [], choices, **options)
    formats = [unit.activations[BASE].formats for unit in menu]
    parts = {name for each in formats for name in (*each.layers, *each.attentions)}
    assert {name for name, _ in found.activations} == parts
    # The ends of a range are exact, so one timestep's embedding is; and nothing may read what a layer gives.
    assert sum(bool(power.min() > 0) for power in found.activations.values()) > 0.9 * len(parts)
    attentions = [n for unit in menu for n in unit.activations[BASE].formats.attentions]
    batch = calibration.gather(trajectory_rows(calibration, STEPS, 2))
    exact = replay(calibrated(family)[0].model, batch)
    for name in attentions[:1]:
        other = calibrated(family)[0].model
        (state,) = [u.activations[BASE] for u in menu if name in u.activations[BASE].formats.attentions]
        alone = UnitState(
            type(state.formats)(state.formats.unit, {}, {name: state.formats.attentions[name]}),
            state.timesteps,
            {key: tensor for key, tensor in state.tensors.items() if key.startswith(f"{name}.attention_quantizer.")},
        )
        build_quantized(other, merge_formats([alone]))
        load_states(other, [alone])
        powers = (replay(other, batch) - exact).double().square().flatten(1).mean(1).reshape(2, 2).mean(1)
        assert torch.allclose(found.activations[name, 8][STEPS], powers, rtol=1e-3)


def test_gains_are_power_at_the_sample_per_power_at_the_prediction(
    made: tuple[Denoiser, CalibrationSet, list[MenuUnit]],
) -> None:
    denoiser, _, menu = made
    states = [unit.weights[4] for unit in menu if unit.weights]
    first, again = (measure_gains(denoiser, states, SAMPLER, range(3), batch_size=size) for size in (2, 2))
    assert first == again == StepGains.from_bytes(first.to_bytes())
    assert len(first.gains) == len(first.timesteps) == 3
    assert min(first.gains) > 0
    assert 0.3 < first.coherence < 4  # of independent errors 1, of three equal ones 3


def test_steps_in_between_are_interpolated() -> None:
    found = interpolated(torch.tensor([1.0, 3.0], dtype=torch.float64), [1, 3], 6)
    assert found.tolist() == [1, 1, 2, 3, 3, 3]


def test_rows_are_other_seeds_at_each_step(calibrated: Callable[..., tuple[Denoiser, CalibrationSet]]) -> None:
    _, calibration = calibrated("unet")
    assert trajectory_rows(calibration, [0, 1, 2], 2).tolist() == [0, 1, 4 + 2, 4 + 3, 8 + 0, 8 + 1]
