from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import quant_core
from quant_core.artifact.folder import WEIGHTS_FILE, write_artifact
from quant_core.diffusion.calibration import CalibrationSet, replay
from quant_core.diffusion.denoiser import Denoiser
from quant_core.errors import ArtifactError
from quant_core.fit.channel_scaling import ChannelScaling
from quant_core.fit.rounding import UnitRanges, round_units
from quant_core.fit.unit_state import UnitState, load_states, merge_formats
from quant_core.inspect.inspection import inspect_model
from quant_core.methods.mpqdm.allocation import allocate
from quant_core.methods.mpqdm.channel_errors import measure_units
from quant_core.methods.mpqdm.layer_errors import LayerErrors, from_bytes, kurtosis, to_bytes
from quant_core.metrics.cost import model_cost
from quant_core.nn.layers import QuantLayer, weight_matrix
from quant_core.nn.model import build_quantized
from quant_spec.enums import AllocationMethod, RoundingMethod
from quant_spec.formats import SHIFT_DEPTH, ActivationSpec, UnitFormat
from quant_spec.passes.allocate import AllocateChoice
from quant_spec.quantization_config import quantization_config
from tests.quant_core.agreement import check_release
from tests.quant_core.params import measurement, rounding

Calibrated = Callable[..., tuple[Denoiser, CalibrationSet]]
ChooseFormats = Callable[..., list[tuple[UnitFormat, UnitRanges]]]
CONFIG = measurement(2, 8, 4)


def names_of(units: list[tuple[UnitFormat, UnitRanges]]) -> list[str]:
    return [name for formats, _ in units for name in formats.layers]


@pytest.fixture(scope="module")
def measured(calibrated: Calibrated, unit_formats: ChooseFormats) -> dict[str, LayerErrors]:
    denoiser, calibration = calibrated("unet")
    units = unit_formats(denoiser, bits=2, activation=ActivationSpec(4), weight_range="mse")
    return measure_units(denoiser.model, calibration, units, names_of(units), CONFIG)


@pytest.mark.parametrize("family", ["unet", pytest.param("text_unet", marks=pytest.mark.slow), "dit", "flux"])
def test_every_layer_is_measured_and_the_model_left_as_it_was(
    family: str, calibrated: Calibrated, unit_formats: ChooseFormats
) -> None:
    denoiser, calibration = calibrated(family, 2)
    before = {name: value.clone() for name, value in denoiser.model.state_dict().items()}
    units = unit_formats(denoiser, bits=3)
    found = measure_units(denoiser.model, calibration, units, names_of(units), CONFIG)
    assert set(found) == set(names_of(units))
    assert all(torch.equal(value, before[name]) for name, value in denoiser.model.state_dict().items())
    for name, layer in found.items():
        weight = denoiser.model.get_parameter(f"{name}.weight")
        assert layer.errors.shape == (len(weight), 3)
        assert torch.allclose(layer.kurtosis, kurtosis(weight_matrix(weight)))
        assert (layer.bits, layer.columns) == (3, weight[0].numel())
        total = layer.errors.sum(dim=0)
        assert total[0] >= total[2]


def test_the_effect_is_what_a_layers_error_does_to_the_prediction(
    calibrated: Calibrated, unit_formats: ChooseFormats
) -> None:
    denoiser, calibration = calibrated("unet")
    units = unit_formats(denoiser, bits=3, activation=None)
    # The last layer's output is the prediction, so without activations quantized its effect is the mean over channels.
    found = measure_units(denoiser.model, calibration, units, ["conv_out"], measurement(2, 10_000, 4))
    assert found["conv_out"].effect == pytest.approx(1 / 3, rel=1e-4)


@pytest.mark.parametrize("name", ["down_blocks.1.resnets.0.conv1", "time_embedding.linear_1"])
@pytest.mark.parametrize(("shifted", "method"), [(False, "nearest"), (True, "nearest"), (False, "closed_form")])
def test_errors_of_scaled_channels_are_those_of_the_rounded_layer(
    name: str, shifted: bool, method: str, calibrated: Calibrated, unit_formats: ChooseFormats
) -> None:
    denoiser, calibration = calibrated("unet")
    plain, packed = denoiser.model, calibrated("unet")[0].model
    units = unit_formats(denoiser, bits=3, activation=ActivationSpec(4))
    channels = plain.get_submodule(name).weight.shape[1]  # type: ignore[union-attr, index]
    weight_dims = plain.get_submodule(name).weight.dim()  # type: ignore[union-attr, operator]
    draw = torch.Generator().manual_seed(1)
    scaling = ChannelScaling({name: torch.rand(channels, generator=draw) * 3 + 0.3})
    if shifted:
        table = torch.randint(SHIFT_DEPTH + 1, (calibration.steps, channels), generator=draw, dtype=torch.uint8)
        scaling = ChannelScaling(scaling.scales, {name: table})
    config = measurement(4, 10_000, 4, rounding=RoundingMethod(method))
    found = measure_units(plain, calibration, units, [name], config, scaling)[name]
    deployed = rounding(method, forward_batch_size=4, positions=10_000)
    rounded = round_units(packed, calibration, units, deployed, scaling.scales, scaling.shifts)
    layer = packed.get_submodule(name)
    assert isinstance(layer, QuantLayer)
    load_states(packed, [each.state for each in rounded])
    inputs: list[torch.Tensor] = []
    plain.get_submodule(name).register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    powers = []
    for step, timestep in enumerate(calibration.timesteps):
        replay(plain, calibration.rows(step, 0, calibration.samples))
        layer.act_quantizers[0].clock.set_timestep(float(timestep))  # type: ignore[union-attr, operator]
        error = layer(inputs[-1]) - plain.get_submodule(name)(inputs[-1])
        powers.append(error.double().square().transpose(0, 1).flatten(1))
    scaled = plain.get_submodule(name).weight * scaling.scales[name].view(1, -1, *(1,) * (weight_dims - 2))
    assert torch.allclose(found.kurtosis, kurtosis(weight_matrix(scaled)))
    assert torch.allclose(found.errors[:, 1], torch.cat(powers, dim=1).mean(dim=1), rtol=1e-3)
    assert not torch.allclose(
        found.errors[:, 1], measure_units(plain, calibration, units, [name], config)[name].errors[:, 1], rtol=1e-2
    )


def test_measurements_survive_bytes(measured: dict[str, LayerErrors]) -> None:
    again = from_bytes(to_bytes(measured))
    assert list(again) == sorted(measured)
    for name, layer in again.items():
        assert torch.equal(layer.errors, measured[name].errors)
        assert (layer.bits, layer.columns, layer.effect) == (2, measured[name].columns, measured[name].effect)


@pytest.fixture(scope="module")
def mixed(calibrated: Calibrated, unit_formats: ChooseFormats, measured: dict[str, LayerErrors]) -> list[UnitState]:
    """States with channels of 1, 2 and 3 bits."""
    denoiser, calibration = calibrated("unet")
    units = unit_formats(denoiser, bits=2, activation=ActivationSpec(4), weight_range="mse")
    bits = allocate(measured, AllocateChoice(method=AllocationMethod.GLOBAL, extra=0.1))
    rounded = round_units(denoiser.model, calibration, units, rounding("closed_form"), channel_bits=bits)
    return [each.state for each in rounded]


@pytest.fixture
def folder(mixed: list[UnitState], calibrated: Calibrated, tmp_path: Path) -> Path:
    model = calibrated("unet")[0].model
    config = json.loads(model.to_json_string())
    build_quantized(model, merge_formats(mixed))
    load_states(model, mixed)
    write_artifact(model, config, quantization_config(merge_formats(mixed)), None, tmp_path / "packed")
    return tmp_path / "packed"


def test_mixed_bits_are_packed_counted_and_loaded(
    mixed: list[UnitState], folder: Path, calibrated: Calibrated, measured: dict[str, LayerErrors]
) -> None:
    denoiser, calibration = calibrated("unet")
    model_format = merge_formats(mixed)
    cost = model_cost(inspect_model(denoiser), model_format)
    weights = sum(layer.channels * layer.columns for layer in measured.values())
    extra = sum(round(0.1 * layer.channels) * layer.columns for layer in measured.values())
    assert 2 < cost.weight_bits_mean <= 2 + extra / weights
    assert {bits for spec in model_format.layers.values() for bits, _ in spec.weight.mixture} == {1, 2, 3}
    tensors = load_file(folder / WEIGHTS_FILE)
    rows = sum(layer.channels for layer in measured.values())
    packed = sum(t.numel() for name, t in tensors.items() if name.endswith(".qweight"))
    assert packed <= cost.weight_bits_mean * weights / 8 + rows, "a row ends on a byte"

    build_quantized(denoiser.model, model_format)
    load_states(denoiser.model, mixed)
    loaded = quant_core.load_quantized(folder, device="cpu", backend="reference")
    with torch.no_grad():
        for batch in calibration.by_step(4):
            assert torch.equal(replay(loaded, batch), replay(denoiser.model, batch))
    for backend in ("cpu", "auto"):
        runs = check_release(folder, backend, lambda model: replay(model, batch))
        assert set(runs.values()) <= {"cpu"}


def test_channel_bits_that_do_not_fit_the_config_are_refused(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    name = next(name for name in tensors if name.endswith(".channel_bits"))
    tensors[name] = torch.full_like(tensors[name], 2)
    save_file(tensors, folder / WEIGHTS_FILE, {"format": "pt"})
    with pytest.raises(ArtifactError, match=r"packed tensors of .*: channel bits: got \(bits, channels\)"):
        quant_core.load_quantized(folder)
