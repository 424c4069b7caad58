"""Damages are those of forwards in which one layer is changed, over families of denoisers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quant_core.diffusion.calibration import Batch, CalibrationSet, replay
from quant_core.diffusion.denoiser import Denoiser
from quant_core.diffusion.trajectories import LoopTrajectories
from quant_core.fit.menu import MenuUnit, round_menu
from quant_core.fit.sensitivity import PATHS, Choices, Damage, Row, choose_rows, fitted_to_units, measure
from quant_core.fit.step_gains import StepGains, measure_gains
from quant_core.fit.unit_state import UnitState, load_states, merge_formats
from quant_core.nn.model import build_quantized
from quant_spec.sampler import Sampler
from quant_spec.tasks.menu import BASE, Params

FAMILIES = ("unet", "sd3")
#: Two of the first step, which is a range of its own, and one of the last.
ROWS = [Row(0, 0, 2.0, 0), Row(0, 1, 3.0, 0), Row(2, 3, 0.5, 1)]
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


def rows_of(calibration: CalibrationSet) -> Batch:
    return calibration.gather(torch.tensor([row.step * calibration.samples + row.sample for row in ROWS]))


def by_range(error: Tensor) -> Tensor:
    power = error.double().square().flatten(1).mean(1)
    return torch.stack([2 * power[0] + 3 * power[1], 0.5 * power[2]])


Tensors = dict[str, Tensor]


def tensors_of(denoiser: Denoiser, states: list[UnitState]) -> dict[str, Tensors]:
    """Return weights and biases as packed layers hold them; the denoiser's layers are replaced."""
    parts = build_quantized(denoiser.model, merge_formats(states))
    load_states(denoiser.model, states)
    return {
        name: {"weight": layer.weight} | ({} if layer.bias is None else {"bias": layer.bias})
        for name, layer in parts.layers.items()
    }


def changed(model: nn.Module, tensors: dict[str, Tensors], share: float, layer: str, own: Tensors | None) -> nn.Module:
    """Give all layers but one a share of their error, and that one tensors of its own, or its exact ones."""
    for name, rounded in tensors.items():
        for part, tensor in rounded.items():
            parameter = model.get_parameter(f"{name}.{part}")
            if name != layer:
                parameter.data = torch.lerp(parameter.data, tensor, share)
            elif own is not None:
                parameter.data = own[part]
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
    options: dict[str, Any] = {"path": PATHS[points], "rows": ROWS, "batch_size": 3}
    found = measure(denoiser.model, calibration, units, context, choices, **options)
    assert all(torch.equal(value, before[name]) for name, value in denoiser.model.state_dict().items())
    layers = [name for unit in menu for name in unit.weights.get(2, unit.weights[4]).formats.layers]
    assert found.weights.keys() == {(name, bits) for name in layers for bits in (2, 4)}
    low, mid = (tensors_of(calibrated(family)[0], [u.weights[bits] for u in menu if u.weights]) for bits in (2, 4))
    batch = rows_of(calibration)
    for name in (layers[1], layers[len(layers) // 2], layers[-1]):
        powers = torch.zeros(2, dtype=torch.float64)
        for share in PATHS[points]:
            exact, worse = (
                replay(changed(calibrated(family)[0].model, mid, share, name, own), batch) for own in (None, low[name])
            )
            powers += by_range(worse - exact) / len(PATHS[points])
        assert torch.allclose(found.weights[name, 2], powers, rtol=1e-3)


def test_an_inputs_damage_is_that_of_quantizing_it_alone(
    made: tuple[Denoiser, CalibrationSet, list[MenuUnit]],
    calibrated: Callable[..., tuple[Denoiser, CalibrationSet]],
    family: str,
) -> None:
    denoiser, calibration, menu = made
    choices = Choices([], [unit.activations[BASE] for unit in menu] * 2)  # the base's width, on the menu too
    units = [unit.unit for unit in menu]
    options: dict[str, Any] = {"path": PATHS[0], "rows": ROWS, "batch_size": 8}
    found = measure(denoiser.model, calibration, units, [], choices, **options)
    formats = [unit.activations[BASE].formats for unit in menu]
    parts = {name for each in formats for name in (*each.layers, *each.attentions)}
    assert {name for name, _ in found.activations} == parts
    # The ends of a range are exact, so one timestep's embedding is; and nothing may read what a layer gives.
    assert sum(bool(power.min() > 0) for power in found.activations.values()) > 0.9 * len(parts)
    attentions = [n for unit in menu for n in unit.activations[BASE].formats.attentions]
    batch = rows_of(calibration)
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
        assert torch.allclose(found.activations[name, 8], by_range(replay(other, batch) - exact), rtol=1e-3)


def loop(denoiser: Denoiser) -> LoopTrajectories:
    return LoopTrajectories(denoiser.model, denoiser.scheduler_config, SAMPLER, denoiser.conditioning)


def test_gains_are_power_at_the_sample_per_power_at_the_prediction(
    made: tuple[Denoiser, CalibrationSet, list[MenuUnit]],
) -> None:
    denoiser, _, menu = made
    states = [unit.weights[4] for unit in menu if unit.weights]
    first, again = (measure_gains(loop(denoiser), states, range(3), batch_size=size) for size in (2, 2))
    assert first == again == StepGains.from_bytes(first.to_bytes())
    assert len(first.gains) == len(first.timesteps) == 3
    assert min(first.gains) > 0
    assert 0.3 < first.coherence < 4  # of independent errors 1, of three equal ones 3
    assert list(first.units) == [state.formats.unit for state in states]
    unit = states[1]
    alone = measure_gains(loop(denoiser), [unit], range(3), batch_size=2)
    assert alone.units == {unit.formats.unit: first.units[unit.formats.unit]}
    assert alone.units[unit.formats.unit] == pytest.approx(alone.coherence * sum(alone.powers))


def test_damages_of_a_unit_add_up_to_what_was_measured_of_it(
    made: tuple[Denoiser, CalibrationSet, list[MenuUnit]],
) -> None:
    context = [unit.weights[4] for unit in made[2] if unit.weights]
    first, second = context[0].formats, context[1].formats
    keys = [(name, bits) for formats in (first, second) for name in formats.layers for bits in (2, 4)]
    damage = Damage({key: torch.tensor([float(place + 1)]) for place, key in enumerate(keys)}, {})
    found = fitted_to_units(damage, context, {first.unit: 7.0})
    assert sum(float(found.weights[name, 4]) for name in first.layers) == pytest.approx(7.0)
    name = next(iter(first.layers))
    ratio = float(damage.weights[name, 2] / damage.weights[name, 4])
    assert float(found.weights[name, 2] / found.weights[name, 4]) == pytest.approx(ratio)
    for name in second.layers:
        assert found.weights[name, 4] == damage.weights[name, 4], "nothing was measured of this unit"


def gains_of(*powers: float) -> StepGains:
    return StepGains(tuple(map(float, range(len(powers)))), tuple(p / 2 for p in powers), (2.0,) * len(powers), 3.0)


def test_rows_lie_where_damage_is_made_and_count_what_it_is() -> None:
    rows = choose_rows(gains_of(6, 2, 1, 1), range(4), 8, 10)
    assert [row.step for row in rows] == [0] * 6 + [1] * 2 + [2, 3]
    assert [row.sample for row in rows] == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1]
    # The very error that gains were measured with, 2 at each step, does what it did: all powers, times the coherence.
    assert sum(row.weight * 2 for row in rows) == pytest.approx(3 * 10)


def test_each_range_has_a_row_and_its_own_share() -> None:
    rows = choose_rows(gains_of(90, 8, 1, 1), range(4), 8, 4, ranges=2)
    assert [(row.step, row.span) for row in rows] == [(0, 0)] * 4 + [(2, 1)]
    assert sum(row.weight * 2 for row in rows if row.span == 1) == pytest.approx(3 * 2)


def test_steps_that_were_not_recorded_have_the_rows_of_the_nearest() -> None:
    rows = choose_rows(gains_of(1, 1, 1, 1), (0, 3), 8, 4)
    assert [row.step for row in rows] == [0, 0, 1, 1]
