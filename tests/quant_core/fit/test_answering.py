"""Codes that answer for the layers before: nearest to the exact output, whatever the formats; nothing else moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quant_core.diffusion.calibration import CalibrationSet, replay
from quant_core.diffusion.denoiser import Denoiser
from quant_core.fit.answering import answer
from quant_core.fit.layer_rounding import round_layer
from quant_core.fit.low_rank_branch import LowRankBranch
from quant_core.fit.rounding import UnitRanges, round_units
from quant_core.fit.unit_state import UnitState, collect_state, load_states, merge_formats
from quant_core.nn.layers import QuantLayer, weight_matrix
from quant_core.nn.model import QuantizedParts, build_quantized
from quant_core.nn.steps import StepClock
from quant_spec.enums import ActivationMode, Granularity, NumberType
from quant_spec.formats import ActivationSpec, LayerSpec, UnitFormat, WeightSpec
from quant_spec.ranges import RangeSpec
from quant_spec.tasks.answer import Params
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


def params(states: list[UnitState], **settings: Any) -> Params:
    """Return parameters with min-max ranges of all layers."""
    return Params(ranges={name: RangeSpec() for state in states for name in state.formats.layers}, seed=0, **settings)


class Chain(nn.Module):
    """Two convolutions, called as a denoiser is; and a layer that reads no batch of rows."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, 8, 3, padding=1)
        self.second = nn.Conv2d(8, channels, 1)
        self.embed = nn.Linear(4, 1)
        for seed, parameter in enumerate(self.parameters()):
            parameter.data = 0.4 * normal(*parameter.shape, seed=seed)

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> tuple[Tensor]:
        return (self.second(torch.relu(self.first(sample))) + self.embed(torch.ones(1, 4)),)


#: What the second layer has beside its codes, and whether its bias takes the mean error.
SECOND_LAYERS: dict[str, tuple[dict[str, Any], bool]] = {
    "codes alone": ({}, False),
    "scaled channels": ({"channel_scale": True}, False),
    "a low-rank branch": ({"low_rank": 1}, False),
    "a branch upon scaled channels": ({"low_rank": 1, "channel_scale": True}, False),
    "a bias that takes the mean error": ({"channel_scale": True}, True),
}


@pytest.mark.parametrize(("own", "correct_bias"), SECOND_LAYERS.values(), ids=SECOND_LAYERS)
def test_codes_come_nearest_to_the_exact_output(
    own: dict[str, Any], correct_bias: bool, calibrated: Calibrated
) -> None:
    """The second layer, almost exact in 8 bits, has the weight of least squares for what the first gives in 2."""
    _, calibration = calibrated("unet", 4)
    inputs = calibration.gather(torch.arange(calibration.steps * calibration.samples)).x
    model = Chain(inputs.shape[1])
    clock = StepClock(())
    layers = {
        "first": QuantLayer(model.first, LayerSpec(WeightSpec(2, granularity=Granularity.PER_CHANNEL), None), clock),
        "second": QuantLayer(
            model.second, LayerSpec(WeightSpec(8, granularity=Granularity.PER_CHANNEL), None, **own), clock
        ),
        "embed": QuantLayer(model.embed, LayerSpec(WeightSpec(2, granularity=Granularity.PER_CHANNEL), None), clock),
    }
    second = layers["second"]
    if "channel_scale" in own:
        second.set_channel_scale(normal(8, seed=20).exp())
    if "low_rank" in own:
        second.set_branch(0.1 * normal(1, 8, seed=21), 0.1 * normal(inputs.shape[1], 1, seed=22))
    for name, layer in layers.items():
        weight = layer.scaled(model.get_submodule(name).get_parameter("weight").detach())
        round_layer(layer, weight, None, RangeSpec(), 0.0)
    formats = UnitFormat("chain", {name: layer.spec for name, layer in layers.items()}, {})
    before = collect_state(QuantizedParts(clock, layers, {}), formats, ())
    ranges = dict.fromkeys(layers, RangeSpec())
    config = Params(samples=4, positions=10**6, damping=1e-7, correct_bias=correct_bias, ranges=ranges, seed=0)
    made = answer(model, calibration, [before], config)

    assert set(made.layer_sqnr_db) == {"first", "second"}
    assert isinstance(model.second, nn.Conv2d), "the model is as it was"
    (after,) = made.states
    same = {name for name in before.tensors if torch.equal(before.tensors[name], after.tensors[name])}
    changed = {"qweight", "scale", "zero_point"} | ({"bias"} if correct_bias else set())
    assert before.tensors.keys() - same <= {f"{name}.{part}" for name in ("first", "second") for part in changed}
    assert {"second.qweight", "second.scale"} <= before.tensors.keys() - same
    first = layers["first"]
    first.load_state_dict({name.removeprefix("first."): t for name, t in after.below("first.").items()})
    second.load_state_dict({name.removeprefix("second."): t for name, t in after.below("second.").items()})
    with torch.no_grad():
        exact = model.second(torch.relu(model.first(inputs))).movedim(1, -1).flatten(0, -2)
        met = torch.relu(first(inputs)).movedim(1, -1).flatten(0, -2)
        plain = weight_matrix(model.second.weight)
        made_of = weight_matrix(second.unscaled(second.weight))
        ones = torch.ones(len(met), 1)
        if correct_bias:
            met, plain = torch.cat([met, ones], dim=1), torch.cat([plain, model.second.bias[:, None]], dim=1)
            assert second.bias is not None
            made_of = torch.cat([made_of, second.bias[:, None]], dim=1)
        else:
            exact = exact - model.second.bias

        def error(weight: Tensor) -> float:
            return float((met @ weight.T - exact).square().mean())

        best = error(torch.linalg.lstsq(met, exact).solution.T)
        assert error(made_of) - best < 0.05 * (error(plain) - best)


def test_the_answer_is_damped_ten_times_as_much_as_rounding(calibrated: Calibrated) -> None:
    """Of a first layer whose input is exact, nothing is to be answered; of the second, what the damped inverse says."""
    _, calibration = calibrated("unet", 4)
    inputs = calibration.gather(torch.arange(calibration.steps * calibration.samples)).x
    model, clock = Chain(inputs.shape[1]), StepClock(())
    layers = {
        "first": QuantLayer(model.first, LayerSpec(WeightSpec(2, granularity=Granularity.PER_CHANNEL), None), clock),
        "second": QuantLayer(model.second, LayerSpec(WeightSpec(8, granularity=Granularity.PER_CHANNEL), None), clock),
    }
    formats = UnitFormat("chain", {name: layer.spec for name, layer in layers.items()}, {})
    blank = collect_state(QuantizedParts(clock, layers, {}), formats, ())
    (made,) = answer(model, calibration, [blank], params([blank], samples=4, positions=10**6, damping=0.03)).states
    for name, layer in layers.items():
        layer.load_state_dict({n.removeprefix(f"{name}."): t for n, t in made.below(f"{name}.").items()})
    with torch.no_grad():
        exact = model.second(torch.relu(model.first(inputs))).movedim(1, -1).flatten(0, -2) - model.second.bias
        met = torch.relu(layers["first"](inputs)).movedim(1, -1).flatten(0, -2)
        weight, got = weight_matrix(model.second.weight), weight_matrix(layers["second"].weight)
        second, product = met.T @ met / len(met), exact.T @ met / len(met)

        def distance(leaning: float) -> float:
            damped = second + leaning * 0.03 * second.diagonal().mean() * torch.eye(len(second))
            return float((weight + torch.linalg.solve(damped, (product - weight @ second).T).T - got).square().sum())

        assert distance(10) < 0.1 * min(distance(1), distance(100))


def test_damping_leans_codes_to_the_weights_own(calibrated: Calibrated, unit_formats: ChooseFormats) -> None:
    denoiser, calibration = calibrated("text_unet", 4)
    units = unit_formats(denoiser, bits=3, activation=ActivationSpec(8))
    nearest = [each.state for each in round_units(denoiser.model, calibration, units, rounding())]

    def moved(damping: float) -> float:
        told = params(nearest, samples=4, positions=4, damping=damping)
        made = answer(calibrated("text_unet", 4)[0].model, calibration, nearest, told).states
        names = [f"{name}.qweight" for state in nearest for name in state.formats.layers]
        pairs = [
            (o.tensors[n], m.tensors[n]) for o, m in zip(nearest, made, strict=True) for n in names if n in o.tensors
        ]
        return sum(float((one != two).float().sum()) for one, two in pairs) / sum(one.numel() for one, _ in pairs)

    assert moved(1e6) < 0.001 < 0.05 < moved(0.03)


def chain_error(family: str, states: list[UnitState], calibrated: Calibrated) -> float:
    """Return the error power of the prediction, over all steps."""
    exact, calibration = calibrated(family, 8)
    model = calibrated(family, 8)[0].model
    build_quantized(model, merge_formats(states))
    load_states(model, states)
    with torch.no_grad():
        powers = [
            float((replay(model, batch) - replay(exact.model, batch)).square().mean())
            for batch in calibration.by_step(8)
        ]
    return sum(powers)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_answer_for_those_before_them(
    family: str, mode: ActivationMode, calibrated: Calibrated, unit_formats: ChooseFormats
) -> None:
    denoiser, calibration = calibrated(family, 8)
    units = unit_formats(denoiser, bits=3, activation=ActivationSpec(8, mode=mode))
    config = rounding("closed_form", positions=64)
    plain = [each.state for each in round_units(denoiser.model, calibration, units, config)]
    told = params(plain, samples=8, positions=64)
    answered = answer(calibrated(family, 8)[0].model, calibration, plain, told).states
    # A draw of rounding decides on such small transformers.
    most = 0.8 if "unet" in family else 1.5
    assert chain_error(family, answered, calibrated) < most * chain_error(family, plain, calibrated)
    again = answer(calibrated(family, 8)[0].model, calibration, plain, told).states
    assert [each.to_bytes() for each in again] == [each.to_bytes() for each in answered]
    for one, two in zip(plain, answered, strict=True):
        kept = [name for name in one.tensors if name.endswith(".bias") or "_quantizer" in name]
        assert all(torch.equal(one.tensors[name], two.tensors[name]) for name in kept)
    assert any(one.to_bytes() != two.to_bytes() for one, two in zip(plain, answered, strict=True))


def mixed(denoiser: Denoiser, units: list[tuple[UnitFormat, UnitRanges]]) -> dict[str, Any]:
    """Half of each layer's output channels in 2 bits, the rest in 4."""
    shapes = {n: len(denoiser.model.get_parameter(f"{n}.weight")) for formats, _ in units for n in formats.layers}
    bits = {n: torch.where(torch.arange(count) % 2 == 0, 4, 2).to(torch.uint8) for n, count in shapes.items()}
    return {"channel_bits": bits}


def scaled(denoiser: Denoiser, units: list[tuple[UnitFormat, UnitRanges]]) -> dict[str, Any]:
    """Random factors of all input channels."""
    shapes = {n: denoiser.model.get_parameter(f"{n}.weight").shape[1] for formats, _ in units for n in formats.layers}
    return {"channel_scales": {n: (0.5 * normal(count)).exp() for n, count in shapes.items()}}


def branched(denoiser: Denoiser, units: list[tuple[UnitFormat, UnitRanges]]) -> dict[str, Any]:
    """A branch of rank 2 beside the codes of each linear layer."""
    names = [n for formats, _ in units for n in formats.layers]
    linear = {n: layer for n in names if isinstance(layer := denoiser.model.get_submodule(n), nn.Linear)}
    branches = {}
    for name, layer in linear.items():
        up, values, down = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
        branches[name] = LowRankBranch((values[:2, None] * down[:2]).bfloat16(), up[:, :2].bfloat16())
    return {"branches": branches}


@pytest.mark.parametrize("chosen", [mixed, scaled, branched], ids=lambda each: each.__name__)
def test_answers_compose_with_what_changes_weights_and_inputs(
    chosen: Callable[..., dict[str, Any]], calibrated: Calibrated, unit_formats: ChooseFormats
) -> None:
    denoiser, calibration = calibrated("text_unet", 8)
    units = unit_formats(denoiser, bits=4 if chosen is mixed else 3, activation=ActivationSpec(8))
    config = rounding("closed_form", positions=64)
    made = round_units(denoiser.model, calibration, units, config, **chosen(denoiser, units))
    plain = [each.state for each in made]
    told = params(plain, samples=8, positions=64)
    answered = answer(calibrated("text_unet", 8)[0].model, calibration, plain, told).states
    assert chain_error("text_unet", answered, calibrated) < 0.8 * chain_error("text_unet", plain, calibrated)


def test_fp8_numbers_answer_too(calibrated: Calibrated, unit_formats: ChooseFormats) -> None:
    denoiser, calibration = calibrated("text_unet", 8)
    units = unit_formats(denoiser, bits=8, activation=ActivationSpec(8))
    weight = WeightSpec(8, symmetric=True, granularity=Granularity.PER_CHANNEL, type=NumberType.E4M3)
    units = [
        (UnitFormat(f.unit, {n: LayerSpec(weight, s.activation) for n, s in f.layers.items()}, f.attentions), ranges)
        for f, ranges in units
    ]
    plain = [each.state for each in round_units(denoiser.model, calibration, units, rounding("closed_form"))]
    answered = answer(
        calibrated("text_unet", 8)[0].model, calibration, plain, params(plain, samples=8, positions=64)
    ).states
    assert chain_error("text_unet", answered, calibrated) < chain_error("text_unet", plain, calibrated)
