"""Layers whose input channels are scaled (equivalent scaling) and shifted (power-of-two scaling)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import quant_core
from kernels.activations import quantize_by_table_reference
from quant_core.artifact.dequantize import dequantized_state
from quant_core.artifact.folder import WEIGHTS_FILE, write_artifact
from quant_core.diffusion.calibration import CalibrationSet, replay
from quant_core.diffusion.denoiser import Denoiser
from quant_core.errors import ArtifactError
from quant_core.fit.reconstruction import reconstruct_unit
from quant_core.fit.rounding import UnitRanges, round_units
from quant_core.fit.unit_state import UnitState, load_states, merge_formats
from quant_core.nn.activation import ActivationQuantizer, Channels
from quant_core.nn.layers import QuantLayer, weight_from_matrix
from quant_core.nn.model import build_quantized
from quant_core.nn.ranges import QParams
from quant_core.nn.steps import StepClock
from quant_spec.enums import ActivationMode
from quant_spec.errors import QuantizationError
from quant_spec.formats import ActivationSpec, LayerSpec, UnitFormat, WeightSpec
from quant_spec.quantization_config import quantization_config
from tests.quant_core.agreement import check_release
from tests.quant_core.params import reconstruction, rounding

Calibrated = Callable[..., tuple[Denoiser, CalibrationSet]]
ChooseFormats = Callable[..., list[tuple[UnitFormat, UnitRanges]]]

RESNET = "down_blocks.1.resnets.0"
LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(6, 5), (4, 3, 6)),
    "conv1d": (nn.Conv1d(6, 5, 3, padding=1), (4, 6, 7)),
    "conv2d": (nn.Conv2d(6, 5, 3, padding=1, stride=2), (4, 6, 8, 8)),
}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_layer(kind: str, split: tuple[int, ...] | None, *, exact: bool) -> tuple[QuantLayer, StepClock]:
    """A layer with scaled and shifted channels; with `exact`, all scales are powers of two, so floats do not round."""
    clock = StepClock((9, 5, 1))
    spec = LayerSpec(WeightSpec(4), ActivationSpec(6), split, channel_scale=True, channel_shift=True)
    layer = QuantLayer(LAYERS[kind][0], spec, clock)  # type: ignore[arg-type]
    draw = torch.Generator().manual_seed(1)
    codes = torch.randint(16, (5, layer.columns), generator=draw, dtype=torch.uint8)
    zero = torch.randint(16, layer.zero_point.shape, generator=draw, dtype=torch.uint8)
    scale = torch.full(layer.scale.shape, 0.125) if exact else torch.rand(layer.scale.shape, generator=draw) + 0.1
    layer.set_codes(codes, scale, zero)
    for quantizer in layer.act_quantizers:
        assert isinstance(quantizer, ActivationQuantizer)
        steps = torch.tensor([1 / 64, 1 / 32, 1 / 16]) if exact else torch.rand(3, generator=draw) * 0.05 + 0.01
        quantizer.set_qparams(QParams(steps, torch.randint(64, (3,), generator=draw).float()))
        quantizer.channel_shift.copy_(torch.randint(4, quantizer.channel_shift.shape, generator=draw))
    layer.set_channel_scale(torch.exp(0.5 * random(6, seed=2)))
    return layer, clock


def integer_output(layer: QuantLayer, x: Tensor, step: int) -> Tensor:
    """One sample's output without bias: sums of (x_code - z) * ((w_code - w_z) << shift), then both scales."""
    dim = -1 if layer.kind is nn.Linear else 1
    parts = layer.spec.split or (6,)
    total: Tensor | float = 0.0
    weights = layer.codes().long() - layer.zero_point.long()[:, layer.group_index]
    weight = weight_from_matrix(weights, layer.shape)
    quantizers = [part for part in layer.act_quantizers if isinstance(part, ActivationQuantizer)]
    bounds = [sum(parts[:i]) for i in range(len(parts))]
    for part, (first, count, quantizer) in enumerate(zip(bounds, parts, quantizers, strict=True)):
        own, shift = x.narrow(dim, first, count), quantizer.channel_shift[step].long()
        spread = (-1,) if dim == -1 else (-1, *(1,) * (x.dim() - 2))
        divisor = quantizer.scale[step] * 2.0 ** shift.reshape(spread) * quantizer.channel_scale.reshape(spread)
        zero = quantizer.zero_point[step]
        codes = ((torch.round(own / divisor) + zero).clamp(0, 63) - zero).long()
        shifted = weight[:, first : first + count] << shift.reshape(1, -1, *(1,) * (weight.dim() - 2))
        if dim == -1:
            sums = F.linear(codes.double(), shifted.double())
        else:
            convolution = F.conv1d if x.dim() == 3 else F.conv2d
            stride = layer.stride[0]
            sums = convolution(codes.double(), shifted.double(), stride=stride, padding=1)
        assert torch.equal(sums, sums.round())  # integers, exact in float64
        scale = layer.scale[:, part if len(parts) > 1 else 0].double()
        total = total + sums * quantizer.scale[step].double() * scale.reshape(-1, *(() if dim == -1 else spread[1:]))
    assert isinstance(total, Tensor)
    return total


@pytest.mark.parametrize("kind", list(LAYERS))
@pytest.mark.parametrize("split", [None, (2, 4)])
@torch.no_grad()
def test_the_layer_is_integer_sums_with_shifted_weight_codes(kind: str, split: tuple[int, ...] | None) -> None:
    x = random(*LAYERS[kind][1], seed=3)
    for exact in (True, False):
        layer, clock = make_layer(kind, split, exact=exact)
        clock.set_timestep(torch.tensor([9.0, 1.0, 5.0, 9.0]))  # each sample has its own step
        layer.bias = None
        got = layer(x)
        for row, step in enumerate((0, 2, 1, 0)):
            wanted = integer_output(layer, x[row : row + 1], step)
            if exact:
                assert torch.equal(got[row : row + 1].double(), wanted)
            else:
                torch.testing.assert_close(got[row : row + 1].double(), wanted, rtol=1e-5, atol=1e-5)


def test_the_codes_are_those_of_the_kernels() -> None:
    clock = StepClock((9, 5))
    quantizer = ActivationQuantizer(ActivationSpec(6), clock, channels=Channels(6, -1, scaled=False, shifted=True))
    quantizer.set_qparams(QParams(torch.tensor([0.013, 0.021]), torch.tensor([20.0, 31.0])))
    quantizer.channel_shift.copy_(torch.tensor([[0, 1, 2, 3, 3, 0], [3, 3, 0, 0, 1, 2]]))
    x = random(2, 50, 6)
    clock.set_timestep(torch.tensor([9.0, 5.0]))
    for row in range(2):
        divisor = quantizer.scale[:, None] * 2.0 ** quantizer.channel_shift.float()
        codes, scale, zero = quantize_by_table_reference(
            x[row], quantizer.scale, quantizer.zero_point, torch.tensor([row]), divisor, 6
        )
        steps = scale * 2.0 ** quantizer.channel_shift[row].float()
        assert torch.equal(quantizer(x)[row], (codes.float() - zero) * steps)


@pytest.mark.parametrize("mode", [ActivationMode.STATIC, ActivationMode.DYNAMIC_SAMPLE, ActivationMode.DYNAMIC_TOKEN])
def test_scaled_channels_in_other_modes_are_the_divided_input_quantized(mode: ActivationMode) -> None:
    spec, clock = ActivationSpec(8, mode=mode), StepClock((9, 5))
    scaled = ActivationQuantizer(spec, clock, channels=Channels(4, -1, scaled=True, shifted=False))
    plain = ActivationQuantizer(spec, clock)
    factor = torch.tensor([0.5, 1.0, 2.0, 8.0])  # powers of two, so that dividing in two steps rounds like one
    scaled.channel_scale.copy_(factor)
    if mode is ActivationMode.STATIC:
        for quantizer in (scaled, plain):
            quantizer.set_qparams(QParams(torch.tensor([0.03]), torch.tensor([120.0])))
    x = random(3, 5, 4)
    assert torch.equal(scaled(x), plain(x / factor))
    scaled.enabled = False
    assert torch.equal(scaled(x), x / factor)


def test_gradients_pass_through_scaled_and_shifted_channels() -> None:
    quantizer = ActivationQuantizer(
        ActivationSpec(8), StepClock((9, 5)), channels=Channels(2, -1, scaled=True, shifted=True)
    )
    quantizer.set_qparams(QParams(torch.tensor([0.1, 1.0]), torch.tensor([100.0, 100.0])))
    quantizer.channel_scale.copy_(torch.tensor([2.0, 4.0]))
    quantizer.channel_shift.copy_(torch.tensor([[0, 1], [3, 3]]))
    quantizer.soft_scale = quantizer.scale.clone().requires_grad_()
    x = torch.tensor([[1.03, 1.03], [99.0, -999.0]], requires_grad=True)  # the second row is clipped
    quantizer(x).backward(torch.tensor([[1.0, 10.0], [100.0, 1000.0]]))
    assert x.grad is not None
    assert x.grad.tolist() == [[0.5, 2.5], [0.0, 0.0]]  # 1 / channel scale inside
    steps = torch.tensor([1.03 / 0.2, 1.03 / 0.8])
    offsets = steps.round() - steps
    wanted = offsets[0] + 10 * offsets[1] * 2 + 100 * 155 - 1000 * 100 * 2
    torch.testing.assert_close(quantizer.soft_scale.grad, torch.stack([wanted, torch.tensor(0.0)]))


@torch.no_grad()
def test_rounding_learning_packing_and_loading_agree(
    calibrated: Calibrated, unit_formats: ChooseFormats, tmp_path: Path
) -> None:
    denoiser, calibration = calibrated("digits", 4)
    floats = calibrated("digits", 4)[0].model
    units = unit_formats(denoiser, bits=6, activation=ActivationSpec(6))
    names = [n for formats, _ in units if formats.unit == RESNET for n in formats.layers if "conv" in n]
    scales = {n: torch.exp(0.5 * random(floats.get_parameter(f"{n}.weight").shape[1])) for n in names}
    config = rounding("closed_form", positions=8)
    made = round_units(denoiser.model, calibration, units, config, scales)
    states = [each.state for each in made]
    place = [state.formats.unit for state in states].index(RESNET)
    learn = reconstruction(iterations=10, batch_size=4)
    with torch.enable_grad():
        found = reconstruct_unit(calibrated("digits", 4)[0].model, calibration, states[place], [], learn, tmp_path)
    assert found.sqnr_db_after >= found.sqnr_db_before > 10
    states[place] = found.state

    simulated = calibrated("digits", 4)[0].model
    parts = build_quantized(simulated, merge_formats(states))
    load_states(simulated, states)
    for name in names:
        layer = parts.layers[name]
        # the codes stand for the weight times the scale
        wanted = floats.get_parameter(f"{name}.weight") * scales[name].reshape(1, -1, 1, 1)
        assert float((layer.weight - wanted).norm()) < 0.1 * float(wanted.norm())
    folder = tmp_path / "packed"
    write_artifact(
        simulated, json.loads(floats.to_json_string()), quantization_config(merge_formats(states)), None, folder
    )
    loaded = quant_core.load_quantized(folder, backend="reference")
    batch = calibration.gather(torch.tensor([0, 5, 9]))
    assert torch.equal(replay(loaded, batch), replay(simulated, batch))
    for backend in ("cpu", "auto"):
        runs = check_release(folder, backend, lambda model: replay(model, batch))
        assert set(runs.values()) <= {"cpu"}
    # as a plain model, the weight is what it was again
    for name in names:
        plain = dequantized_state(loaded)[f"{name}.weight"]
        exact = floats.get_parameter(f"{name}.weight")
        assert float((plain - exact).norm()) < 0.1 * float(exact.norm())

    broken = load_file(folder / WEIGHTS_FILE)
    broken[f"{names[0]}.act_quantizers.0.channel_scale"][1] = 0
    save_file(broken, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match="zero, negative or not finite"):
        quant_core.load_quantized(folder)


def test_ranges_and_second_moments_are_those_of_the_divided_input(
    calibrated: Calibrated, unit_formats: ChooseFormats
) -> None:
    def table(scales: dict[str, Tensor]) -> UnitState:
        denoiser, calibration = calibrated("digits", 4)
        units = [unit for unit in unit_formats(denoiser) if unit[0].unit == RESNET]
        return round_units(denoiser.model, calibration, units, rounding(), scales)[0].state

    name = f"{RESNET}.conv1"
    plain = table({})
    channels = calibrated("digits", 4)[0].model.get_parameter(f"{name}.weight").shape[1]
    halved = table({name: torch.full((channels,), 2.0)})
    key = f"{name}.act_quantizers.0.scale"
    assert torch.equal(halved.tensors[key] * 2, plain.tensors[key])
    assert torch.equal(halved.tensors[f"{name}.qweight"], plain.tensors[f"{name}.qweight"])
    assert torch.equal(halved.tensors[f"{name}.scale"], plain.tensors[f"{name}.scale"] * 2)
    assert UnitState.from_bytes(halved.to_bytes()).formats.layers[name].channel_scale


def test_formats_say_nothing_of_channels_that_are_not_scaled() -> None:
    spec = LayerSpec(WeightSpec(4), ActivationSpec(8))
    assert set(spec.to_json()) == {"weight", "activation", "split"}
    scaled = LayerSpec(WeightSpec(4), ActivationSpec(8), channel_scale=True, channel_shift=True)
    assert LayerSpec.from_json(scaled.to_json()) == scaled


def test_what_cannot_be_scaled_is_refused() -> None:
    with pytest.raises(QuantizationError, match="channel_shift: got mode dynamic_token"):
        LayerSpec(WeightSpec(4), ActivationSpec(8, mode=ActivationMode.DYNAMIC_TOKEN), channel_shift=True)
    with pytest.raises(QuantizationError, match="a convolution of 2 groups"):
        QuantLayer(
            nn.Conv2d(4, 4, 3, groups=2), LayerSpec(WeightSpec(4), ActivationSpec(8), channel_scale=True), StepClock(())
        )
