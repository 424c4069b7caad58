from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.weights import pack_weight, weight_integers
from quant_core.nn.activation import ActivationQuantizer
from quant_core.nn.layers import (
    QuantLayer,
    quantize_layers,
    weight_from_matrix,
    weight_groups,
    weight_matrix,
)
from quant_core.nn.ranges import QParams
from quant_core.nn.steps import StepClock
from quant_spec.enums import ActivationMode, Granularity
from quant_spec.errors import QuantizationError
from quant_spec.formats import ActivationSpec, LayerSpec, WeightSpec


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kernel", [(), (3,), (3, 2), (2, 1, 3)])
def test_weight_matrix_and_back(kernel: tuple[int, ...]) -> None:
    weight = random(5, 4, *kernel)
    matrix = weight_matrix(weight)
    taps = weight[0, 0].numel()
    assert matrix.shape == (5, 4 * taps)
    # channels last within a tap
    for tap in range(taps):
        assert torch.equal(matrix[:, 4 * tap : 4 * tap + 4], weight.reshape(5, 4, taps)[:, :, tap])
    assert torch.equal(weight_from_matrix(matrix, tuple(weight.shape)), weight)


@pytest.mark.parametrize(
    ("granularity", "size", "split", "groups"),
    [
        ("per_tensor", None, (2, 3), [0] * 10),
        ("per_channel", None, None, [0] * 10),
        ("per_channel", None, (2, 3), [0, 0, 1, 1, 1] * 2),
        ("per_group", 5, None, [0, 0, 0, 0, 0, 1, 1, 1, 1, 1]),
        ("per_group", 2, None, [0, 0, 1, 1, 2, 3, 3, 4, 4, 5]),  # the last one is ragged
        ("per_group", 2, (2, 3), [0, 0, 1, 1, 2, 3, 3, 4, 4, 5]),
        ("per_group", 2, (3, 2), [0, 0, 1, 2, 2, 3, 3, 4, 5, 5]),  # no group crosses the parts' border
        ("per_group", 64, (3, 2), [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]),
    ],
)
def test_weight_groups(granularity: str, size: int | None, split: tuple[int, ...] | None, groups: list[int]) -> None:
    spec = LayerSpec(WeightSpec(4, granularity=Granularity(granularity), group_size=size), split=split)
    assert weight_groups((7, 5, 2), spec).tolist() == groups


def test_a_split_covers_the_input() -> None:
    with pytest.raises(QuantizationError, match=r"got parts \(2, 2\), wanted a sum of 5 input channels"):
        weight_groups((7, 5), LayerSpec(WeightSpec(4), split=(2, 2)))


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(6, 5), (3, 4, 6)),
    "linear without bias": (nn.Linear(6, 5, bias=False), (3, 6)),
    "conv1d": (nn.Conv1d(6, 4, 3, padding=1), (3, 6, 9)),
    "conv2d": (nn.Conv2d(6, 4, (3, 2), stride=(2, 1), padding=(1, 0)), (3, 6, 7, 8)),
    "same": (nn.Conv2d(6, 4, 3, padding="same", dilation=2), (3, 6, 7, 8)),
    "circular": (nn.Conv2d(6, 4, 3, padding=2, padding_mode="circular"), (3, 6, 7, 8)),
    "reflect": (nn.Conv2d(6, 4, 3, stride=2, padding=1, padding_mode="reflect"), (3, 6, 7, 8)),
    "grouped": (nn.Conv2d(6, 4, 3, groups=2), (3, 6, 7, 8)),
    "conv3d": (nn.Conv3d(6, 4, (1, 3, 2), dilation=(1, 2, 1)), (3, 6, 2, 7, 8)),
}


def hand_written(layer: Any, made: QuantLayer, x: Tensor) -> Tensor:
    """Dequantize input and weight with plain arithmetic and run the float layer's own forward."""
    spec, dim = made.spec, -1 if isinstance(layer, nn.Linear) else 1
    parts = []
    for quantizer, part in zip(made.act_quantizers, x.split(spec.split or (x.shape[dim],), dim=dim), strict=True):
        scale, zero = quantizer.scale[0], quantizer.zero_point[0]
        codes = torch.clamp(torch.round(part / scale) + zero, 0, 2**spec.activation.bits - 1)
        parts.append((codes - zero) * scale)
    weight = torch.empty_like(layer.weight)
    codes, channels = made.codes(), layer.weight.shape[1]
    columns = weight.flatten(2) if weight.dim() > 2 else weight[..., None]
    for row in range(len(codes)):
        for column, group in enumerate(made.group_index.tolist()):
            at = (min(row, len(made.scale) - 1), group)
            value = (codes[row, column].float() - made.zero_point[at].float()) * made.scale[at]
            columns[row, column % channels, column // channels] = value
    # Convolutions sum in an order that depends on how their weight lies in memory, so it lies as the layer's.
    layer.weight = nn.Parameter(torch.empty_strided(weight.shape, made.weight.stride()).copy_(weight))
    with torch.no_grad():
        return layer(torch.cat(parts, dim=dim))


@pytest.mark.parametrize("kind", list(LAYERS))
@pytest.mark.parametrize(
    ("split", "weight"),
    [
        (None, {}),
        ((2, 4), {}),
        ((2, 4), {"granularity": "per_group", "group_size": 3}),
        (None, {"granularity": "per_tensor"}),
    ],
)
def test_forward_equals_dequantize_then_the_float_layer(
    kind: str, split: tuple[int, ...] | None, weight: dict[str, Any]
) -> None:
    layer, shape = LAYERS[kind]
    if kind == "grouped" and split:
        pytest.skip("the parts of a grouped convolution's input are its groups")
    spec = LayerSpec(WeightSpec(3, **weight), ActivationSpec(6, mode=ActivationMode.STATIC), split)
    made = QuantLayer(layer, spec, StepClock(()))  # type: ignore[arg-type]
    draw = torch.Generator().manual_seed(1)
    codes = torch.randint(8, (made.shape[0], made.columns), generator=draw, dtype=torch.uint8)
    zero_point = torch.randint(8, made.zero_point.shape, generator=draw, dtype=torch.uint8)
    made.set_codes(codes, torch.rand(made.scale.shape, generator=draw) + 0.1, zero_point)
    assert torch.equal(made.codes(), codes)
    for part, quantizer in enumerate(made.act_quantizers):
        assert isinstance(quantizer, ActivationQuantizer)
        quantizer.set_qparams(QParams(torch.tensor([0.05 + 0.02 * part]), torch.tensor([20.0 + 9 * part])))
    x = random(*shape)
    with torch.no_grad():
        got = made(x)
    wanted = hand_written(layer, made, x)
    assert torch.equal(got, wanted)
    assert not torch.allclose(got, layer(x))  # its input was quantized too


def test_codes_are_small() -> None:
    layer = nn.Conv2d(64, 32, 3)
    made = QuantLayer(layer, LayerSpec(WeightSpec(4)), StepClock(()))
    held = sum(value.numel() * value.element_size() for value in made.state_dict().values())
    assert held == 32 * 64 * 9 // 2 + 32 * (4 + 1 + 4)  # codes; scale, zero point and bias
    assert not list(made.parameters())


@pytest.mark.parametrize("mode", ["dynamic_token", "dynamic_sample"])
def test_a_convolution_takes_one_dynamic_range_per_sample(mode: str) -> None:
    layer = nn.Conv1d(2, 2, 1, bias=False)
    made = QuantLayer(layer, LayerSpec(WeightSpec(8), ActivationSpec(2, mode=ActivationMode(mode))), StepClock(()))
    x = torch.tensor([[[0.0, 3.0], [0.0, 1.0]]])  # one token, or channel, alone would get 1.0 exactly as well
    assert made.quantize_input(x * 0.4).tolist() == (x * 0.4).tolist()
    x = torch.tensor([[[0.0, 3.0], [0.0, 0.4]]])
    assert made.quantize_input(x).tolist() == [[[0.0, 3.0], [0.0, 0.0]]]


def test_soft_weight_stands_in_for_the_codes() -> None:
    made = QuantLayer(nn.Linear(3, 2, bias=False), LayerSpec(WeightSpec(4)), StepClock(()))
    made.soft_weight = random(2, 3)
    x = random(4, 3, seed=1)
    assert torch.equal(made(x), F.linear(x, made.soft_weight))


def test_quantize_layers_replaces_by_name() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ModuleDict({"inner": nn.Conv1d(4, 2, 1)}), nn.Linear(2, 2))
    spec = LayerSpec(WeightSpec(8))
    made = quantize_layers(model, {"0": spec, "1.inner": spec}, StepClock(()))
    assert model[0] is made["0"]
    assert model.get_submodule("1.inner") is made["1.inner"]
    assert isinstance(model[2], nn.Linear)
    with pytest.raises(QuantizationError, match="layer 1: got ModuleDict, wanted Conv1d, Conv2d, Conv3d or Linear"):
        quantize_layers(model, {"1": spec}, StepClock(()))


def test_half_precision_models_keep_their_dtype() -> None:
    layer = nn.Linear(4, 4).to(torch.bfloat16)
    made = QuantLayer(layer, LayerSpec(WeightSpec(8), ActivationSpec(8, mode=ActivationMode.STATIC)), StepClock(()))
    assert made.weight.dtype is torch.bfloat16
    assert made(random(2, 4).to(torch.bfloat16)).dtype is torch.bfloat16


MIXTURE = ((1, 2), (2, 3), (4, 1))
CHANNEL_BITS = [2, 1, 4, 2, 1, 2]


def mixed_layer() -> tuple[QuantLayer, Tensor]:
    """A convolution whose output channels have 1, 2 and 4 bits, its codes set."""
    layer = QuantLayer(nn.Conv2d(3, 6, 3), LayerSpec(WeightSpec(4, mixture=MIXTURE)), StepClock(()))
    layer.set_channel_bits(torch.tensor(CHANNEL_BITS, dtype=torch.uint8))
    generator = torch.Generator().manual_seed(0)
    codes = torch.stack([torch.randint(0, 2**bits, (27,), generator=generator) for bits in CHANNEL_BITS]).to(
        torch.uint8
    )
    layer.set_codes(codes, torch.linspace(0.1, 0.6, 6)[:, None], torch.ones(6, 1))
    return layer, codes


def test_channels_have_their_own_bits_and_take_no_more_room() -> None:
    layer, codes = mixed_layer()
    # 27 codes in a row: 4 bytes of 1 bit, 7 of 2 bits, 14 of 4 bits
    assert layer.qweight.shape == (2 * 4 + 3 * 7 + 14,)
    assert torch.equal(layer.codes(), codes)
    weight = layer.weight
    assert torch.allclose(weight[2].permute(1, 2, 0).flatten(), (codes[2].float() - 1) * layer.scale[2])
    assert layer.spec.weight.bits_mean == pytest.approx(sum(CHANNEL_BITS) / 6)


def test_rows_of_a_width_go_to_the_kernels_as_a_record_of_their_channels() -> None:
    layer, codes = mixed_layer()
    groups = {bits: (channels, rows) for bits, channels, rows in layer.bit_groups()}
    assert {bits: channels.tolist() for bits, (channels, _) in groups.items()} == {1: [1, 4], 2: [0, 3, 5], 4: [2]}
    integers = torch.empty(6, 9, 3, dtype=torch.int32)
    for bits, (channels, rows) in groups.items():
        zero = layer.zero_point[channels]
        packed = pack_weight(rows, layer.scale[channels], zero, bits=bits, channels=3, taps=9, channel=channels)
        integers[channels] = weight_integers(packed)
    assert torch.equal(integers.flatten(1), codes.int() - 1)


def test_a_mixture_survives_json_and_uniform_formats_are_as_they_were() -> None:
    spec = LayerSpec(WeightSpec(4, mixture=MIXTURE))
    assert LayerSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    assert "mixture" not in LayerSpec(WeightSpec(4)).to_json()["weight"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"bits": 4, "mixture": ((2, 3), (1, 1))}, "with bits rising"),
        ({"bits": 4, "mixture": ((2, 3), (7, 1))}, "with bits rising"),
        ({"bits": 4, "mixture": ((2, 3), (4, 0))}, "at least 1 channel"),
        ({"bits": 4, "mixture": ((2, 3), (3, 1))}, "got a greatest of 3 bits with 4 bits"),
        ({"bits": 1}, "weight: got 1 bits"),
    ],
)
def test_mixtures_that_make_no_sense_are_refused(spec: dict[str, object], message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        WeightSpec(**spec)  # type: ignore[arg-type]


def test_channel_bits_that_are_not_the_mixtures_are_refused() -> None:
    layer, _ = mixed_layer()
    with pytest.raises(QuantizationError, match="channel bits: got"):
        layer.set_channel_bits(torch.full((6,), 2, dtype=torch.uint8))
    with pytest.raises(QuantizationError, match="wanted a sum of 7 output channels"):
        QuantLayer(nn.Linear(3, 7), LayerSpec(WeightSpec(4, mixture=MIXTURE)), StepClock(()))
