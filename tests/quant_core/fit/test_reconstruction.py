from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quant_core.diffusion.calibration import CalibrationSet
from quant_core.diffusion.denoiser import Denoiser
from quant_core.fit.reconstruction import ReconstructedUnit, reconstruct_unit
from quant_core.fit.rounding import UnitRanges, round_units
from quant_core.fit.unit_cache import record_unit
from quant_core.fit.unit_state import UnitState, load_states, merge_formats
from quant_core.nn.layers import QuantLayer
from quant_core.nn.model import build_quantized
from quant_spec.enums import ActivationMode, StartCodes, UnitInputs
from quant_spec.formats import ActivationSpec, UnitFormat
from tests.quant_core.params import reconstruction, rounding

Calibrated = Callable[..., tuple[Denoiser, CalibrationSet]]
ChooseFormats = Callable[..., list[tuple[UnitFormat, UnitRanges]]]

SEEDS = 8
RESNET = "down_blocks.1.resnets.0"
QUICK = reconstruction(iterations=80, batch_size=8, lr=0.1, trust=0.0, rounding_weight=10.0)


@pytest.fixture(scope="module")
def starts(calibrated: Calibrated, unit_formats: ChooseFormats) -> dict[str, UnitState]:
    """Every unit of the digits model rounded to the nearest of 4 bits, in the order in which they run."""
    denoiser, calibration = calibrated("digits", SEEDS)
    made = round_units(denoiser.model, calibration, unit_formats(denoiser), rounding())
    return {each.state.formats.unit: each.state for each in made}


@pytest.fixture
def learn(calibrated: Calibrated, starts: dict[str, UnitState], tmp_path: Path) -> Callable[..., ReconstructedUnit]:
    """Reconstruct one unit of a fresh digits model."""

    def run(unit: str = RESNET, state: UnitState | None = None, **config: Any) -> ReconstructedUnit:
        denoiser, calibration = calibrated("digits", SEEDS)
        names = list(starts)
        earlier = [starts[name] for name in names[: names.index(unit)]]
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        chosen = QUICK.replaced(**config)
        return reconstruct_unit(denoiser.model, calibration, state or starts[unit], earlier, chosen, folder)

    return run


def unit_error(calibrated: Calibrated, state: UnitState, scratch: Path) -> float:
    """The squared error of a unit's output on full-precision inputs, relative to the signal; over all samples."""
    denoiser, calibration = calibrated("digits", SEEDS)
    name = state.formats.unit
    scratch.mkdir(exist_ok=True)
    recording = record_unit(
        denoiser.model, name, calibration, batch_size=8, budget=1 << 30, scratch=scratch, label="check"
    )
    parts = build_quantized(denoiser.model, merge_formats([state]))
    load_states(denoiser.model, [state])
    noise = signal = 0.0
    with torch.no_grad():
        for step, timestep in enumerate(calibration.timesteps):
            index = torch.arange(calibration.samples) + step * calibration.samples
            parts.clock.set_timestep(timestep)
            args, kwargs = recording.inputs.batch(index, "cpu")
            got, wanted = denoiser.model.get_submodule(name)(*args, **kwargs), recording.outputs.batch(index, "cpu")
            noise += float((got - wanted).square().sum())
            signal += float(wanted.square().sum())
    return noise / signal


def decibel(ratio: float) -> float:
    return float(10 * torch.log10(torch.tensor(ratio)))


@pytest.mark.parametrize("unit", [RESNET, "conv_in", "up_blocks.1.attentions.0"])
def test_it_lowers_a_units_error(
    unit: str,
    learn: Callable[..., ReconstructedUnit],
    calibrated: Calibrated,
    starts: dict[str, UnitState],
    tmp_path: Path,
) -> None:
    unit = next(name for name in starts if name.startswith(unit) or unit.startswith(name))
    result = learn(unit)
    before, after = (unit_error(calibrated, state, tmp_path / "check") for state in (starts[unit], result.state))
    assert decibel(before / after) > 1
    # what is reported is what is measured from outside
    assert result.sqnr_db_before == pytest.approx(-decibel(before), abs=0.02)
    assert result.sqnr_db_after == pytest.approx(-decibel(after), abs=0.02)
    start = starts[unit].tensors
    changed = {name for name, tensor in result.state.tensors.items() if not torch.equal(tensor, start[name])}
    assert changed
    assert all(name.endswith(".qweight") for name in changed)  # grids and ranges stay
    assert result.state.formats == starts[unit].formats
    assert result.state.timesteps == starts[unit].timesteps


def test_two_runs_give_the_same_bytes(learn: Callable[..., ReconstructedUnit]) -> None:
    one, two, other = (learn(iterations=20, seed=seed) for seed in (0, 0, 1))
    assert one.state.to_bytes() == two.state.to_bytes()
    assert one.sqnr_db_after == two.sqnr_db_after
    assert one.state.to_bytes() != other.state.to_bytes()


def test_a_result_that_is_worse_than_its_start_is_not_taken(
    learn: Callable[..., ReconstructedUnit], starts: dict[str, UnitState]
) -> None:
    result = learn(lr=50.0, iterations=5)  # throws every weight to one side
    assert result.state.to_bytes() == starts[RESNET].to_bytes()
    assert result.sqnr_db_after == result.sqnr_db_before


def test_every_weight_has_a_code_next_to_its_own(
    learn: Callable[..., ReconstructedUnit], calibrated: Calibrated
) -> None:
    state = learn().state
    floats = calibrated("digits", SEEDS)[0].model
    weights = {name: floats.get_parameter(f"{name}.weight").detach().clone() for name in state.formats.layers}
    parts = build_quantized(floats, merge_formats([state]))
    load_states(floats, [state])
    moved = 0
    for name, layer in parts.layers.items():
        assert isinstance(layer, QuantLayer)
        assert layer.soft_weight is None
        step = (layer.weight - weights[name]).abs() / layer.scale.max(dim=1).values.reshape(
            -1, *(1,) * (layer.weight.dim() - 1)
        )
        assert float(step.max()) < 1.51  # one step, and half of one where nearest had been clipped
        moved += int((step > 0.51).sum())
    assert moved > 50


def test_inputs_of_the_quantized_model_give_another_result(learn: Callable[..., ReconstructedUnit]) -> None:
    full, quantized = (learn(inputs=inputs) for inputs in (UnitInputs.FP, UnitInputs.QUANTIZED))
    assert full.state.to_bytes() != quantized.state.to_bytes()
    # the target stays the full-precision output, and what came before adds its error
    assert quantized.sqnr_db_before < full.sqnr_db_before - 1
    assert quantized.sqnr_db_after > quantized.sqnr_db_before


def test_a_tiny_memory_budget_gives_a_close_result(learn: Callable[..., ReconstructedUnit], tmp_path: Path) -> None:
    kept, spilled = learn(), learn(cache_bytes=1000)
    files = sorted(file.name for file in (tmp_path / "1").iterdir())
    assert not list((tmp_path / "0").iterdir())
    assert files == ["fp_inputs_0.bf16", "fp_inputs_1.bf16", "fp_outputs_0.bf16"]
    assert spilled.sqnr_db_after == pytest.approx(kept.sqnr_db_after, abs=0.3)
    assert spilled.sqnr_db_after > spilled.sqnr_db_before + 0.5


def scales(state: UnitState) -> dict[str, Tensor]:
    return {name: t for name, t in state.tensors.items() if "act_quantizers" in name and name.endswith("scale")}


def test_learned_activation_scales_move_and_help(
    calibrated: Calibrated, unit_formats: ChooseFormats, learn: Callable[..., ReconstructedUnit]
) -> None:
    denoiser, calibration = calibrated("digits", SEEDS)
    units = [u for u in unit_formats(denoiser, bits=8, activation=ActivationSpec(3)) if u[0].unit == RESNET]
    start = round_units(denoiser.model, calibration, units, rounding())[0].state
    fixed, learned = (
        learn(state=start, learn_activation_scales=choice, activation_lr=1e-2) for choice in (False, True)
    )
    assert all(torch.equal(scale, scales(start)[name]) for name, scale in scales(fixed.state).items())
    for name, scale in scales(learned.state).items():
        assert scale.shape == (3,)
        assert bool((scale != scales(start)[name]).all())
        assert bool((scale > 0).all())
    assert learned.sqnr_db_after > fixed.sqnr_db_after + 0.5


def test_a_closed_form_start_is_refined(
    calibrated: Calibrated, unit_formats: ChooseFormats, learn: Callable[..., ReconstructedUnit]
) -> None:
    denoiser, calibration = calibrated("digits", SEEDS)
    units = [u for u in unit_formats(denoiser, bits=3) if u[0].unit == RESNET]
    config = rounding("closed_form")
    start = round_units(denoiser.model, calibration, units, config)[0].state
    result = learn(state=start, trust=0.5, lr=1e-2, rounding_weight=100.0, iterations=150)
    assert result.sqnr_db_after > result.sqnr_db_before


def test_it_can_start_from_the_nearest_codes_again(
    starts: dict[str, UnitState], learn: Callable[..., ReconstructedUnit]
) -> None:
    far = {name: 255 - t if name.endswith("qweight") else t for name, t in starts[RESNET].tensors.items()}
    start = replace(starts[RESNET], tensors=far)
    result = learn(state=start, start=StartCodes.NEAREST)
    assert result.state.to_bytes() == learn().state.to_bytes()
    kept = learn(state=start, start=StartCodes.NEAREST, lr=50.0, iterations=5)  # a result that is not taken
    assert kept.state.to_bytes() == starts[RESNET].to_bytes()


@pytest.mark.parametrize("mode", [ActivationMode.DYNAMIC_SAMPLE, None])
def test_units_without_activation_tables(
    mode: ActivationMode | None,
    calibrated: Calibrated,
    unit_formats: ChooseFormats,
    learn: Callable[..., ReconstructedUnit],
) -> None:
    denoiser, calibration = calibrated("digits", SEEDS)
    activation = None if mode is None else ActivationSpec(8, mode=mode)
    units = [u for u in unit_formats(denoiser, activation=activation) if u[0].unit == RESNET]
    start = round_units(denoiser.model, calibration, units, rounding())[0].state
    result = learn(state=start, learn_activation_scales=True)
    assert result.sqnr_db_after > result.sqnr_db_before + 1


def test_the_model_needs_no_gradients_of_its_own(
    calibrated: Calibrated, starts: dict[str, UnitState], tmp_path: Path
) -> None:
    denoiser, calibration = calibrated("digits", SEEDS)
    model: nn.Module = denoiser.model.requires_grad_(True)
    reconstruct_unit(model, calibration, starts[RESNET], [], QUICK.replaced(iterations=2), tmp_path)
    assert all(parameter.grad is None for parameter in model.parameters())
