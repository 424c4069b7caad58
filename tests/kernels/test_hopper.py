"""Hopper's own main loop: its integers are the reference's, with every tile that is tried when a GPU is tuned."""

from __future__ import annotations

import pytest
import torch

from kernels.activations import QuantizedActivation
from kernels.conv import ConvGeometry, conv2d_int_reference
from kernels.epilogue import EpilogueRows
from kernels.fp8 import Fp8Matrix, linear_fp8_reference, quantize_fp8
from kernels.gemm import linear_int_reference
from kernels.weights import unpack_weight
from tests.kernels.example_layers import random_layer

# Rounding to bfloat16 of equal integers, scaled: half a step of 8 bits.
ROUNDED = 2.0**-8

TILES = [(128, 128, 4, 3, 2), (128, 256, 8, 3, 1), (256, 128, 8, 4, 2), (64, 128, 4, 4, 1), (256, 160, 8, 3, 2)]


def needs_hopper() -> None:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("not a Hopper GPU")


def codes(*shape: int, runs: int) -> QuantizedActivation:
    g = torch.Generator().manual_seed(shape[-1])
    x = torch.randint(-128, 128, shape, generator=g, dtype=torch.int8)
    scale = torch.rand(runs, generator=g) + 0.1
    zero = torch.randint(-128, 128, (runs,), generator=g, dtype=torch.int32)
    return QuantizedActivation(x.cuda(), scale.cuda(), zero.cuda(), symmetric=False)


def rows(m: int, n: int, runs: int = 0) -> EpilogueRows:
    g = torch.Generator(device="cuda").manual_seed(m)
    bias = torch.randn(n, device="cuda", dtype=torch.bfloat16, generator=g)
    residual = torch.randn(m, n, device="cuda", dtype=torch.bfloat16, generator=g)
    gate = torch.randn(runs, n + 8, device="cuda", dtype=torch.bfloat16, generator=g)[:, :n] if runs else None
    return EpilogueRows(bias, residual, None, None, gate)


def check(got: torch.Tensor, want: torch.Tensor, tolerance: float = ROUNDED) -> None:
    want = want.view(got.shape)
    assert bool(((got.float() - want).abs() <= tolerance * want.abs() + 1e-3 * want.abs().mean()).all())


@pytest.mark.gpu
@pytest.mark.parametrize(("m", "n", "warps", "stages", "halves"), TILES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_linear_is_the_references(m: int, n: int, warps: int, stages: int, halves: int, symmetric: bool) -> None:
    needs_hopper()
    from kernels._triton.hopper_launch import linear_int8, takes, takes_weights
    from kernels._triton.tuned import HOPPER, Tile

    x, layer = codes(1200, 400, runs=3), random_layer(392, 400, bits=8, symmetric=symmetric, device="cuda")
    added, out = rows(1200, 392, 4), torch.full((1200, 392), torch.nan, device="cuda", dtype=torch.bfloat16)
    tile = Tile(HOPPER, m, n, 128, warps, stages, halves=halves)
    assert takes_weights([layer.packed], tile)
    assert takes(x.codes, layer.packed.codes, added, 392, torch.bfloat16)
    linear_int8(x, layer.packed, added, out, tile)
    check(out, linear_int_reference(x.codes, x.scale, x.zero_point, [layer.packed], added, 392))


@pytest.mark.gpu
@pytest.mark.parametrize(("m", "n", "warps", "stages", "halves"), TILES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_convolution_is_the_references(m: int, n: int, warps: int, stages: int, halves: int, symmetric: bool) -> None:
    needs_hopper()
    from kernels._triton.hopper_launch import conv_int8, takes_image
    from kernels._triton.tuned import HOPPER, Tile

    geometry = ConvGeometry((3, 3), padding=(1, 1))
    x, layer = codes(2, 20, 24, 336, runs=2), random_layer(200, 336, bits=8, taps=9, symmetric=symmetric, device="cuda")
    added, out = rows(960, 200), torch.full((2, 20, 24, 200), torch.nan, device="cuda", dtype=torch.bfloat16)
    assert takes_image(x.codes, geometry)
    conv_int8(x, layer.packed, geometry, added, out, Tile(HOPPER, m, n, 128, warps, stages, halves=halves))
    check(out, conv2d_int_reference(x, [layer.packed], geometry, added, 200))


@pytest.mark.gpu
@pytest.mark.parametrize(("m", "n", "warps", "stages", "halves"), TILES)
def test_fp8_is_the_references(m: int, n: int, warps: int, stages: int, halves: int) -> None:
    needs_hopper()
    from kernels._triton.hopper_launch import linear_fp8
    from kernels._triton.tuned import HOPPER, Tile

    g = torch.Generator(device="cuda").manual_seed(m)
    x, w = (quantize_fp8(torch.randn(size, 400, device="cuda", generator=g)) for size in (1000, 392))
    added, out = rows(1000, 392, 2), torch.full((1000, 392), torch.nan, device="cuda", dtype=torch.bfloat16)
    linear_fp8(x, w, added, out, Tile(HOPPER, m, n, 128, warps, stages, halves=halves))
    want = linear_fp8_reference(Fp8Matrix(x.values, x.scale), w, added, torch.float32)
    assert float((out.float() - want).norm() / want.norm()) < 0.01  # rounding to bfloat16 is 0.002


GROUPED = [(64, 128, 4, 2, 3), (128, 64, 4, 2, 3), (128, 128, 8, 3, 1)]


@pytest.mark.gpu
@pytest.mark.parametrize(("m", "n", "warps", "stages", "programs"), GROUPED)
@pytest.mark.parametrize(("group", "k"), [(128, 128), (128, 64), (64, 64)])
def test_groups_are_the_references(m: int, n: int, warps: int, stages: int, programs: int, group: int, k: int) -> None:
    needs_hopper()
    from kernels._triton.hopper_launch import linear_int8, takes_weights
    from kernels._triton.tuned import HOPPER, Tile

    x, layer = codes(1200, 400, runs=3), random_layer(392, 400, bits=4, group_size=group, device="cuda")
    tile, weights = Tile(HOPPER, m, n, k, warps, stages, per_processor=programs), unpack_weight([layer.packed])
    added, out = rows(1200, 392), torch.full((1200, 392), torch.nan, device="cuda", dtype=torch.bfloat16)
    assert takes_weights(weights, tile)
    linear_int8(x, weights[0], added, out, tile)
    check(out, linear_int_reference(x.codes, x.scale, x.zero_point, weights, added, 392))


@pytest.mark.gpu
@pytest.mark.parametrize(("m", "n", "warps", "stages", "programs"), GROUPED)
def test_convolution_with_groups_is_the_references(m: int, n: int, warps: int, stages: int, programs: int) -> None:
    needs_hopper()
    from kernels._triton.hopper_launch import conv_int8
    from kernels._triton.tuned import HOPPER, Tile

    geometry = ConvGeometry((3, 3), padding=(1, 1))
    x, layer = codes(2, 20, 24, 336, runs=2), random_layer(200, 336, bits=4, group_size=128, taps=9, device="cuda")
    added, out = rows(960, 200), torch.full((2, 20, 24, 200), torch.nan, device="cuda", dtype=torch.bfloat16)
    weights = unpack_weight([layer.packed])
    conv_int8(x, weights[0], geometry, added, out, Tile(HOPPER, m, n, 128, warps, stages, per_processor=programs))
    check(out, conv2d_int_reference(x, weights, geometry, added, 200))
