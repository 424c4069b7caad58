"""Small layers in one compiled call, and small products, against the reference."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels import cpu_weight, native
from kernels.activations import ActivationTable, QuantizedActivation
from kernels.conv import ConvGeometry, conv2d_int
from kernels.cpu import cpu_conv2d, cpu_linear
from kernels.cpu_activation import CpuGrid, cpu_grid, quantize_cpu
from kernels.cpu_call import SmallCalls
from kernels.cpu_weight import CpuWeight, pack_cpu_weight
from kernels.epilogue import Epilogue
from kernels.gemm import linear_int
from kernels.native import ProductLevel
from kernels.norms import GroupNorm
from kernels.weights import PackedWeight
from tests.kernels.example_layers import random_layer
from tests.kernels.test_cpu import GEOMETRIES

pytestmark = pytest.mark.skipif(not native.product_level(), reason="no AVX2, or nothing is compiled")


@pytest.fixture(autouse=True, params=[ProductLevel.AVX2, ProductLevel.VNNI], ids=lambda level: level.name)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ProductLevel:
    """What products are multiplied with: all that this CPU has, in turn."""
    if native.product_level() < request.param:
        pytest.skip(f"this CPU has no {request.param.name}")
    monkeypatch.setattr(native, "product_level", lambda: request.param)
    return ProductLevel(request.param)


KINDS = {
    "4 bits multiplied": {"bits": 4, "group_size": 32, "multiplied": True},
    "4 bits": {"bits": 4},
    "8 bits with zero points": {"bits": 8},
    "8 bits symmetric": {"bits": 8, "symmetric": True},
}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def codes(*shape: int, runs: int) -> tuple[QuantizedActivation, QuantizedActivation]:
    """The same codes with uneven scales as the CPU and as the reference store them."""
    g = torch.Generator().manual_seed(sum(shape))
    unsigned = torch.randint(0, 256, shape, generator=g, dtype=torch.uint8)
    scale = torch.rand(runs, generator=g) * 0.03 + 0.01
    zero = torch.randint(0, 256, (runs,), generator=g, dtype=torch.int32)
    signed = (unsigned.int() - 128).to(torch.int8)
    return QuantizedActivation(unsigned, scale, zero, False), QuantizedActivation(signed, scale, zero - 128, False)


def layer(outputs: int, channels: int, kind: str, taps: int = 1) -> PackedWeight:
    return random_layer(outputs, channels, taps=taps, **KINDS[kind]).packed  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("rows", "outputs", "channels"), [(1, 1, 4), (5, 16, 32), (42, 35, 100), (6, 112, 64), (7, 200, 36)]
)
def test_linear_products_are_the_references_bit_for_bit(kind: str, rows: int, outputs: int, channels: int) -> None:
    weight = layer(outputs, channels, kind)
    packed = pack_cpu_weight([weight])
    assert packed.small is not None
    for runs in {1, rows}:
        x, same = codes(rows, channels, runs=runs)
        for epilogue in (Epilogue(), Epilogue(bias=draw(outputs), residual=draw(rows, outputs, seed=1))):
            assert torch.equal(cpu_linear(x, packed, epilogue), linear_int(same, [weight], epilogue))
    half = Epilogue(torch.bfloat16, draw(outputs), draw(rows, outputs, seed=1).bfloat16())
    assert torch.equal(cpu_linear(x, packed, half), linear_int(same, [weight], half))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_convolutions_are_the_references_bit_for_bit(kind: str, geometry: ConvGeometry) -> None:
    weight = layer(50, 40, kind, geometry.taps)
    packed = pack_cpu_weight([weight], geometry)
    for runs in (1, 2):
        x, same = codes(2, 7, 6, 40, runs=runs)
        epilogue = Epilogue(bias=draw(50), residual=draw(2, *geometry.output_size(7, 6), 50, seed=1))
        assert torch.equal(cpu_conv2d(x, packed, epilogue), conv2d_int(same, [weight], geometry, epilogue))


def test_large_weights_and_ragged_channels_have_none() -> None:
    assert pack_cpu_weight([layer(1024, 516, "4 bits")]).small is None
    assert pack_cpu_weight([layer(16, 33, "4 bits")]).small is None


def grid_of(channels: int) -> CpuGrid:
    divisor = torch.rand(1, channels, generator=torch.Generator().manual_seed(1)) * 0.02 + 0.02
    return cpu_grid(ActivationTable(torch.tensor([0.03]), torch.tensor([117.0]), 8, divisor=divisor))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_call_is_what_several_are(kind: str, geometry: ConvGeometry, dtype: torch.dtype) -> None:
    """Quantization, and the product; with a norm in front, whose codes are the same compiled function's."""
    packed, grid = pack_cpu_weight([layer(50, 40, kind, geometry.taps)], geometry), grid_of(40)
    norm = GroupNorm(4, 1e-5, torch.linspace(0.5, 2, 40), torch.linspace(-1, 1, 40))
    bias = draw(50)
    for each, size in ((None, (7, 6)), (norm, (7, 6)), (norm, (5, 9))):
        calls = SmallCalls(packed, bias, 8, each)
        x = draw(2, 40, *size).to(dtype).permute(0, 2, 3, 1)  # channels apart from each other
        residual = draw(2, *geometry.output_size(*size), 50, seed=1).to(dtype)
        quantized = quantize_cpu(x, grid, 8, padding=geometry.padding, norm=each, silu=each is not None)
        for added in (None, residual):
            want = cpu_conv2d(quantized, packed, Epilogue(dtype, bias, added))
            for given in (x, x.contiguous()):
                got = calls(given, grid, added)
                assert got is not None
                assert torch.equal(got, want)


def test_one_call_of_a_linear_takes_any_rows_and_a_copy_of_its_own() -> None:
    packed, grid, bias = pack_cpu_weight([layer(50, 40, "4 bits multiplied")]), grid_of(40), draw(50)
    calls = SmallCalls(packed, bias, 8)
    twin = copy.deepcopy(calls)
    wide = draw(3, 2, 5, 64)
    for x in (wide[..., :40], draw(1, 40), draw(2, 40, 7).transpose(1, 2)):
        want = cpu_linear(quantize_cpu(x, grid, 8), packed, Epilogue(bias=bias))
        for each in (calls, twin):
            got = each(x, grid, None)
            assert got is not None
            assert torch.equal(got, want)


def test_what_one_call_cannot_do_is_left_to_several() -> None:
    packed, grid = pack_cpu_weight([layer(50, 40, "4 bits")]), grid_of(40)
    calls = SmallCalls(packed, None, 8)
    x = draw(3, 40)
    assert calls(x, grid, None) is not None
    assert calls(x, grid, draw(50, 3).t()) is None, "a residual that is not contiguous"
    assert calls(x, grid, draw(3, 50).bfloat16()) is None, "a residual of another dtype"
    assert calls(x.half(), grid, None) is None
    assert calls(x[:0], grid, None) is None
    assert calls(draw(3, 2, 5, 64)[:, 0, :, :40], grid, None) is None, "rows that are not evenly apart"
    assert SmallCalls(replace(packed, small_work=100), None, 8)(x, grid, None) is None, "a product that is not small"


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_saturate_have_a_product_of_our_own_of_any_size(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exact integers on CPUs of AVX2 alone, in any dtype, also where a compiler traces."""
    monkeypatch.setattr(cpu_weight, "sums_pairs_exactly", lambda: False)
    monkeypatch.setattr(cpu_weight, "SMALL_PRODUCT", 100)
    for geometry in (None, GEOMETRIES[0]):
        weight = layer(50, 40, kind, 1 if geometry is None else geometry.taps)
        packed = pack_cpu_weight([weight], geometry)
        if kind == "4 bits":
            assert (packed.packed is None, packed.small) == (False, None), "oneDNN is exact there"
            continue
        assert packed.packed is None
        rows = 42 if geometry is None else (2, 7, 6)
        x, same = codes(*([rows, 40] if geometry is None else [*rows, 40]), runs=2)  # type: ignore[misc]
        shape = (42, 50) if geometry is None else (2, *geometry.output_size(7, 6), 50)
        epilogue = Epilogue(torch.float16, draw(50), draw(*shape, seed=1).half())
        multiply = cpu_linear if geometry is None else cpu_conv2d

        def product(
            multiply: Callable[..., Tensor] = multiply,
            x: QuantizedActivation = x,
            packed: CpuWeight = packed,
            epilogue: Epilogue = epilogue,
        ) -> Tensor:
            return multiply(x, packed, epilogue)

        want = (
            linear_int(same, [weight], epilogue) if geometry is None else conv2d_int(same, [weight], geometry, epilogue)
        )
        assert torch.equal(product(), want)
        assert torch.equal(torch.compile(product, backend="aot_eager", fullgraph=True)(), want)
