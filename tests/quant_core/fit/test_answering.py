"""Rounding for what the quantized layers before give: it answers for their error, and leaves the model as it was."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from quant_core.diffusion.calibration import CalibrationSet, replay
from quant_core.diffusion.denoiser import Denoiser
from quant_core.fit.answering import answering, round_in_order
from quant_core.fit.rounding import RoundedUnit, UnitRanges, round_units
from quant_core.fit.unit_state import load_states, merge_formats
from quant_core.nn.layers import QuantLayer
from quant_core.nn.model import build_quantized
from quant_core.nn.steps import StepClock
from quant_spec.enums import ActivationMode, UnitInputs
from quant_spec.formats import ActivationSpec, LayerSpec, UnitFormat, WeightSpec
from quant_spec.ranges import RangeSpec
from tests.quant_core.params import rounding

Calibrated = Callable[..., tuple[Denoiser, CalibrationSet]]
ChooseFormats = Callable[..., list[tuple[UnitFormat, UnitRanges]]]

FAMILIES = [
    pytest.param(name, marks=() if name in ("unet", "text_unet", "dit", "sd3") else pytest.mark.slow)
    for name in ("unet", "text_unet", "sdxl_unet", "dit", "pixart", "sd3", "flux", "digits")
]
MODES = [ActivationMode.PER_STEP, ActivationMode.DYNAMIC_TOKEN]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_answer_comes_nearest_to_the_exact_output() -> None:
    weight, exact = normal(8, 32), normal(2000, 32, seed=1)
    met = exact + 0.3 * normal(2000, 32, seed=2) @ normal(32, 32, seed=3) / 32**0.5
    second, cross = met.T @ met / 2000, (exact - met).T @ met / 2000

    def error(made: Tensor) -> float:
        return float((met @ made.T - exact @ weight.T).square().mean())

    made = answering(weight, second, cross, 1e-6)
    best = torch.linalg.lstsq(met, exact @ weight.T).solution.T
    torch.testing.assert_close(made, best, atol=1e-3, rtol=1e-3)
    assert error(made) < 0.9 * error(weight)
    torch.testing.assert_close(answering(weight, second, torch.zeros_like(cross), 0.03), weight)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_answer_for_those_before_them(
    family: str, mode: ActivationMode, calibrated: Calibrated, unit_formats: ChooseFormats
) -> None:
    def rounded(inputs: UnitInputs) -> tuple[list[RoundedUnit], nn.Module]:
        denoiser, calibration = calibrated(family, 8)
        units = unit_formats(denoiser, bits=3, activation=ActivationSpec(8, mode=mode))
        config = rounding("closed_form", positions=64, inputs=inputs)
        made = round_units(denoiser.model, calibration, units, config)
        states = [each.state for each in made]
        fresh = calibrated(family, 8)[0].model
        build_quantized(fresh, merge_formats(states))
        load_states(fresh, states)
        return made, fresh

    def error(model: nn.Module) -> float:
        exact, calibration = calibrated(family, 8)
        with torch.no_grad():
            powers = [
                float((replay(model, batch) - replay(exact.model, batch)).square().mean())
                for batch in calibration.by_step(8)
            ]
        return sum(powers)

    plain, model = rounded(UnitInputs.FP)
    answered, better = rounded(UnitInputs.QUANTIZED)
    # A draw of rounding decides on such small models; where inputs' errors are large, answering does.
    assert error(better) < (0.9 if family == "dit" else 1.5) * error(model)
    assert any(one.state.to_bytes() != two.state.to_bytes() for one, two in zip(plain, answered, strict=True))
    again, _ = rounded(UnitInputs.QUANTIZED)
    assert [each.state.to_bytes() for each in again] == [each.state.to_bytes() for each in answered]
    assert [each.layer_sqnr_db.keys() for each in answered] == [each.layer_sqnr_db.keys() for each in plain]
    for one, two in zip(plain, answered, strict=True):  # ranges are those of the exact model
        tables = [name for name in one.state.tensors if ".act_quantizers." in name or ".attention_quantizer." in name]
        assert all(torch.equal(one.state.tensors[name], two.state.tensors[name]) for name in tables)


def test_layer_that_reads_no_batch_is_left_as_it_is(calibrated: Calibrated) -> None:
    class WithConstant(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.embed = inner, nn.Linear(4, 1)

        def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> tuple[Tensor]:
            return (self.inner(sample, timestep, class_labels).sample + self.embed(torch.ones(1, 4)),)

    denoiser, calibration = calibrated("unet", 2)
    model = WithConstant(denoiser.model)
    clock = StepClock(())
    spec = LayerSpec(WeightSpec(4), None)
    names = ("inner.conv_in", "embed", "inner.conv_out")
    layers = {name: QuantLayer(model.get_submodule(name), spec, clock) for name in names}  # type: ignore[arg-type]
    config = rounding("closed_form", positions=16, inputs=UnitInputs.QUANTIZED)
    made = round_in_order(model, layers, dict.fromkeys(names, RangeSpec()), clock, calibration, config)
    assert set(made) == {"inner.conv_in", "inner.conv_out"}
    assert isinstance(model.embed, nn.Linear)
