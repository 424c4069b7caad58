"""The kernels read what `QuantLayer` stores: integer kernels on its buffers give its simulated output."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kernels.activations import ActivationTable, quantize_by_table
from kernels.conv import ConvGeometry, conv2d_int
from kernels.cpu import cpu_conv2d
from kernels.cpu_activation import cpu_grid, quantize_cpu
from kernels.cpu_weight import pack_cpu_weight, sums_pairs_exactly
from kernels.epilogue import Epilogue
from kernels.gemm import linear_int
from kernels.weights import PackedWeight, pack_weight
from quant_core.nn.layers import Quantizable, QuantLayer
from quant_core.nn.ranges import QParams
from quant_core.nn.steps import StepClock
from quant_spec.enums import ActivationMode, Granularity
from quant_spec.formats import ActivationSpec, LayerSpec, WeightSpec

WEIGHTS = (
    WeightSpec(8),
    WeightSpec(8, granularity=Granularity.PER_TENSOR),
    WeightSpec(4),
    WeightSpec(3),
    WeightSpec(4, granularity=Granularity.PER_GROUP, group_size=32),
    WeightSpec(8, granularity=Granularity.PER_GROUP, group_size=64),
)


def random_layer(layer: Quantizable, weight: WeightSpec) -> tuple[QuantLayer, ActivationTable]:
    """Quantize a layer with random codes and three trajectory steps."""
    g = torch.Generator().manual_seed(weight.bits)
    clock = StepClock([900.0, 500.0, 100.0])
    made = QuantLayer(layer, LayerSpec(weight, ActivationSpec(8, mode=ActivationMode.PER_STEP)), clock)
    made.set_codes(
        torch.randint(0, 1 << weight.bits, (made.shape[0], made.columns), generator=g, dtype=torch.uint8),
        torch.rand(made.scale.shape, generator=g) * 0.02 + 0.005,
        torch.randint(0, 1 << weight.bits, made.zero_point.shape, generator=g, dtype=torch.uint8),
    )
    quantizer = made.act_quantizers[0]
    quantizer.set_qparams(QParams(torch.tensor([0.02, 0.03, 0.01]), torch.tensor([100.0, 128.0, 140.0])))
    clock.set_timestep(torch.tensor([500.0, 100.0]))
    return made, ActivationTable(quantizer.scale, quantizer.zero_point, 8)


def packed(layer: QuantLayer) -> PackedWeight:
    """Hand a layer's buffers to the kernels as they are."""
    taps = layer.columns // layer.shape[1]
    return pack_weight(
        layer.qweight,
        layer.scale,
        layer.zero_point,
        bits=layer.spec.weight.bits,
        channels=layer.shape[1],
        taps=taps,
        group_size=layer.spec.weight.group_size,
    )


@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
@torch.no_grad()
def test_a_linear_layer(weight: WeightSpec) -> None:
    layer, table = random_layer(nn.Linear(72, 20), weight)
    x = torch.randn(2, 5, 72, generator=torch.Generator().manual_seed(1))
    codes = quantize_by_table(x, table, layer.act_quantizers[0].clock.index)
    got = linear_int(codes, [packed(layer)], Epilogue(bias=layer.bias))
    assert torch.allclose(got, layer(x), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (1, 1)])
@torch.no_grad()
def test_a_convolution(weight: WeightSpec, kernel: int, stride: int) -> None:
    pad = kernel // 2
    layer, table = random_layer(nn.Conv2d(72, 20, kernel, stride, pad), weight)
    x = torch.randn(2, 72, 7, 6, generator=torch.Generator().manual_seed(1))
    index, rows = layer.act_quantizers[0].clock.index, x.permute(0, 2, 3, 1)
    geometry = ConvGeometry((kernel, kernel), (stride, stride), (pad, pad))
    want, epilogue = layer(x).permute(0, 2, 3, 1), Epilogue(bias=layer.bias)
    got = conv2d_int(quantize_by_table(rows, table, index), [packed(layer)], geometry, epilogue)
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-3)
    if sums_pairs_exactly():
        cpu = pack_cpu_weight([packed(layer)], geometry)
        got = cpu_conv2d(quantize_cpu(rows, cpu_grid(table, index), table.bits), cpu, epilogue)
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-3)
