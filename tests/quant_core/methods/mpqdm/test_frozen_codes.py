"""Distillation around codes that stay: of what is learned, where it goes, and that it is what a release has."""

from __future__ import annotations

import json
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
from quant_core.fit.unit_state import UnitState, merge_formats
from quant_core.methods.mpqdm.distillation import Distillation, Distilled
from quant_core.methods.mpqdm.scaled_weight import ScaledWeight
from quant_core.nn.layers import QuantLayer
from quant_core.nn.steps import StepClock
from quant_spec.enums import ActivationMode, Granularity, GroupScale, NumberType, WeightCodes
from quant_spec.formats import ActivationSpec, LayerSpec, UnitFormat, WeightSpec
from quant_spec.quantization_config import quantization_config
from tests.quant_core.params import distillation, rounding

Calibrated = Callable[..., tuple[Denoiser, CalibrationSet]]
ChooseFormats = Callable[..., list[tuple[UnitFormat, UnitRanges]]]
#: The format of a layer, by what its scales are.
FORMATS: dict[str, tuple[ActivationSpec, dict[str, Any]]] = {
    "of channels": (ActivationSpec(4), {"bits": 3}),
    "of groups": (ActivationSpec(4), {"bits": 3, "granularity": Granularity.PER_GROUP, "group_size": 4}),
    "whole numbers": (
        ActivationSpec(8),
        {"bits": 3, "granularity": Granularity.PER_GROUP, "group_size": 4, "group_scale": GroupScale.INTEGER},
    ),
    "of floats": (ActivationSpec(8, type=NumberType.E4M3), {"bits": 8, "type": NumberType.E4M3, "symmetric": True}),
    "ranges at run time": (ActivationSpec(8, mode=ActivationMode.DYNAMIC_TOKEN), {"bits": 3}),
}
CONFIG = distillation(codes=WeightCodes.FROZEN, iterations=12, batch_size=4, relations=False)


@pytest.fixture
def start(calibrated: Calibrated, unit_formats: ChooseFormats, trajectories: CalibrationSet) -> Callable[..., Any]:
    def make(kind: str, **changes: Any) -> Distillation:
        denoiser, calibration = calibrated("unet")
        activation, weight = FORMATS[kind]
        searched = "minmax" if activation.is_float or activation.is_dynamic else "mse"
        units = unit_formats(denoiser, activation=activation, activation_range=searched, **weight)
        states = [each.state for each in round_units(denoiser.model, calibration, units, rounding())]
        teacher, model = calibrated("unet")[0].model, calibrated("unet")[0].model
        return Distillation(teacher, model, states, trajectories, CONFIG.replaced(**changes))

    return make


def run(made: Distillation) -> Distilled:
    while made.iteration < made.config.iterations:
        made.step()
    return made.finish()


def tensors_of(states: list[UnitState]) -> dict[str, Tensor]:
    return {name: tensor for state in states for name, tensor in state.tensors.items()}


@pytest.mark.parametrize("kind", FORMATS)
def test_codes_stay_and_what_stands_around_them_is_what_is_deployed(
    start: Callable[..., Distillation], calibrated: Calibrated, trajectories: CalibrationSet, tmp_path: Path, kind: str
) -> None:
    made = start(kind)
    batch = trajectories.gather(torch.arange(4))
    before = tensors_of(made.states)
    full = {name: tensor.clone() for name, tensor in calibrated("unet")[0].model.state_dict().items()}
    while made.iteration < CONFIG.iterations:
        made.step()
    with made._soft():
        soft = replay(made.model, batch).detach()
    result = made.finish()
    assert result.is_taken
    assert result.loss_after < result.loss_before
    after = tensors_of(result.states)

    # Norms are not of the states that distillation began with: what it learned of them is.
    groups = [name for name, module in made.model.named_modules() if isinstance(module, nn.GroupNorm)]
    norms = after.keys() - before.keys()
    assert norms == {f"{name}.{leaf}" for name in groups for leaf in ("weight", "bias")}
    assert all(not torch.equal(after[name], full[name]) for name in norms)
    home = {name: state.formats.unit for state in result.states for name in state.tensors}
    assert home["down_blocks.0.resnets.0.norm1.weight"] == "down_blocks.0.resnets.0"
    assert home["conv_norm_out.weight"] == result.states[-1].formats.unit

    changed = {name for name, tensor in before.items() if not torch.equal(tensor.float(), after[name].float())}
    layers = {name.removesuffix(".qweight") for name in before if name.endswith(".qweight")}
    assert {f"{layer}.bias" for layer in layers if f"{layer}.bias" in before} <= changed
    assert {f"{layer}.scale" for layer in layers} <= changed
    tables = {name for name in before if "act_quantizers" in name and name.endswith(".scale")}
    assert bool(tables) != made.model.get_submodule("conv_in").act_quantizers[0].spec.is_dynamic  # type: ignore[union-attr]
    assert tables <= changed
    kept = [f"{layer}.{leaf}" for layer in layers for leaf in ("qweight", "zero_point", "multiplier")]
    kept = [name for name in kept if name in before]
    assert len(kept) >= len(layers)
    assert not changed & set(kept)
    assert all(torch.equal(before[n].view(torch.uint8), after[n].view(torch.uint8)) for n in kept), "byte for byte"

    with torch.no_grad():
        assert torch.equal(replay(made.model, batch), soft), "what was trained is what is stored"
    config = json.loads(calibrated("unet")[0].model.to_json_string())
    write_artifact(made.model, config, quantization_config(merge_formats(result.states)), None, tmp_path / "packed")
    loaded = quant_core.load_quantized(tmp_path / "packed", device="cpu", backend="reference")
    with torch.no_grad():
        assert torch.equal(replay(loaded, batch), soft)


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(start: Callable[..., Distillation]) -> None:
    whole = run(start("of channels", iterations=4))
    stopped = start("of channels", iterations=4)
    for _ in range(2):
        stopped.step()
    data = stopped.checkpoint()
    stopped.step()  # lost with the process
    resumed = start("of channels", iterations=4)
    resumed.restore(data)
    assert resumed.iteration == 2
    again = run(resumed)
    assert [s.to_bytes() for s in again.states] == [s.to_bytes() for s in whole.states]


def test_norms_stay_where_the_result_is_not_taken(start: Callable[..., Distillation]) -> None:
    result = run(start("of channels", iterations=3, norm_lr=20.0))
    assert not result.is_taken
    assert not any(".norm" in name for name in tensors_of(result.states))


@pytest.mark.parametrize("kind", ["linear", "conv", "one scale"])
def test_the_outputs_gradient_is_the_one_that_the_weight_would_give(kind: str) -> None:
    draw = torch.Generator().manual_seed(0)
    source = nn.Conv2d(6, 5, 3, padding=1) if kind == "conv" else nn.Linear(6, 5)
    one = Granularity.PER_TENSOR if kind == "one scale" else Granularity.PER_CHANNEL
    layer = QuantLayer(source, LayerSpec(WeightSpec(4, granularity=one), None), StepClock([]))
    codes = torch.randint(0, 16, (5, layer.columns), generator=draw).to(torch.uint8)
    layer.set_codes(codes, torch.rand(layer.scale.shape, generator=draw) + 0.1, torch.full(layer.scale.shape, 7))
    x = torch.randn(2, 6, 4, 4, generator=draw) if kind == "conv" else torch.randn(2, 3, 6, generator=draw)
    grads, outputs = [], []
    for by_output in (True, False):
        scaled = ScaledWeight(layer)
        assert scaled._reads_output
        scaled._reads_output = by_output
        assert scaled.bias is not None
        layer.bias = scaled.bias
        scaled.apply()
        output = layer(x)
        scaled.release()
        output.square().sum().backward()
        assert scaled.log_scale.grad is not None
        grads.append(scaled.log_scale.grad)
        outputs.append(output.detach())
    assert torch.equal(*outputs)
    assert torch.allclose(*grads, rtol=1e-4)
    assert bool(grads[0].abs().min() > 0)


def test_a_branch_is_left_out_of_what_scales_are_learned_from() -> None:
    layer = QuantLayer(nn.Linear(8, 4), replace(LayerSpec(WeightSpec(4), None), low_rank=2), StepClock([]))
    assert not ScaledWeight(layer)._reads_output
