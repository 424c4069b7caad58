"""Hopper's own main loop: its integers are the reference's, with every tile that is tried when a GPU is tuned.

Without a GPU its source runs on a stand-in for Gluon (`tests.kernels.gluon_interpreter`), with smaller tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from kernels._triton.tuned import HOPPER, Chip, Tile, entries_of, nearest
from kernels.activations import QuantizedActivation
from kernels.conv import ConvGeometry, conv2d_int_reference
from kernels.epilogue import Epilogue, EpilogueRows
from kernels.fp8 import Fp8Matrix, linear_fp8_reference, quantize_fp8
from kernels.gemm import linear_int, linear_int_reference
from kernels.weights import PackedWeight, unpack_weight
from tests.kernels.example_layers import random_layer
from tests.kernels.gluon_interpreter import Interpreted

# Rounding to bfloat16 of equal integers, scaled: half a step of 8 bits.
ROUNDED = 2.0**-8

TILES = [(128, 128, 4, 3, 2), (128, 256, 8, 3, 1), (256, 128, 8, 4, 2), (64, 128, 4, 4, 1), (256, 160, 8, 3, 2)]


PROCESSORS = 3


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launch the interpreted kernel, on a device of a few multiprocessors."""
    if torch.cuda.is_available():
        pytest.skip("Triton's kernels are compiled where there is a GPU")
    from kernels._triton import hopper_launch

    monkeypatch.setattr(hopper_launch, "product_kernel", Interpreted())
    monkeypatch.setattr(hopper_launch, "chip_of", lambda device: Chip("few", (9, 0), PROCESSORS))


def needs_hopper() -> None:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("not a Hopper GPU")


def codes(*shape: int, runs: int, device: str = "cuda") -> QuantizedActivation:
    g = torch.Generator().manual_seed(shape[-1])
    x = torch.randint(-128, 128, shape, generator=g, dtype=torch.int8)
    scale = torch.rand(runs, generator=g) + 0.1
    zero = torch.randint(-128, 128, (runs,), generator=g, dtype=torch.int32)
    return QuantizedActivation(x.to(device), scale.to(device), zero.to(device), symmetric=False)


def rows(m: int, n: int, runs: int = 0, device: str = "cuda") -> EpilogueRows:
    g = torch.Generator(device=device).manual_seed(m)
    bias = torch.randn(n, device=device, dtype=torch.bfloat16, generator=g)
    residual = torch.randn(m, n, device=device, dtype=torch.bfloat16, generator=g)
    gate = torch.randn(runs, n + 8, device=device, dtype=torch.bfloat16, generator=g)[:, :n] if runs else None
    return EpilogueRows(bias, residual, None, None, gate)


def check(got: torch.Tensor, want: torch.Tensor, tolerance: float = ROUNDED) -> None:
    want = want.view(got.shape)
    assert bool(((got.float() - want).abs() <= tolerance * want.abs() + 1e-3 * want.abs().mean()).all())


def tile_of(m: int, n: int, warps: int, stages: int, halves: int = 1, programs: int = 1, k: int = 128) -> Tile:
    return Tile(HOPPER, m, n, k, warps, stages, halves=halves, per_processor=programs)


def check_linear(weights: Sequence[PackedWeight], tile: Tile, device: str) -> None:
    """Rows and columns that are no multiples of a tile, three runs of ranges, four of gates."""
    from kernels._triton.hopper_launch import linear_int8, takes, takes_weights

    n, x = weights[0].rows, codes(1200, weights[0].layout.channels, runs=3, device=device)
    added, out = rows(1200, n, 4, device), torch.full((1200, n), torch.nan, device=device, dtype=torch.bfloat16)
    assert takes_weights(weights, tile)
    assert takes(x.codes, weights[0].codes, added, n, torch.bfloat16)
    linear_int8(x, weights[0], added, out, tile)
    check(out, linear_int_reference(x.codes, x.scale, x.zero_point, weights, added, n))


def check_convolution(weights: Sequence[PackedWeight], tile: Tile, device: str) -> None:
    """Two images whose sides are no multiples of a rectangle of pixels, a range for each."""
    from kernels._triton.hopper_launch import conv_int8, takes, takes_image, takes_weights

    geometry, n = ConvGeometry((3, 3), padding=(1, 1)), weights[0].rows
    x, added = codes(2, 20, 24, weights[0].layout.channels, runs=2, device=device), rows(960, n, device=device)
    out = torch.full((2, 20, 24, n), torch.nan, device=device, dtype=torch.bfloat16)
    assert takes_image(x.codes, geometry)
    assert takes_weights(weights, tile)
    assert takes(x.codes, weights[0].codes, added, n, torch.bfloat16)
    conv_int8(x, weights[0], geometry, added, out, tile)
    check(out, conv2d_int_reference(x, weights, geometry, added, n))


def check_fp8(tile: Tile, device: str) -> None:
    from kernels._triton.hopper_launch import linear_fp8

    g = torch.Generator(device=device).manual_seed(tile.m)
    x, w = (quantize_fp8(torch.randn(size, 400, device=device, generator=g)) for size in (1000, 392))
    added, out = rows(1000, 392, 2, device), torch.full((1000, 392), torch.nan, device=device, dtype=torch.bfloat16)
    linear_fp8(x, w, added, out, tile)
    want = linear_fp8_reference(Fp8Matrix(x.values, x.scale), w, added, torch.float32)
    assert float((out.float() - want).norm() / want.norm()) < 0.01  # rounding to bfloat16 is 0.002


@pytest.mark.gpu
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_linear_is_the_references(tile: tuple[int, ...], symmetric: bool) -> None:
    needs_hopper()
    check_linear([random_layer(392, 400, bits=8, symmetric=symmetric, device="cuda").packed], tile_of(*tile), "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_convolution_is_the_references(tile: tuple[int, ...], symmetric: bool) -> None:
    needs_hopper()
    layer = random_layer(200, 336, bits=8, taps=9, symmetric=symmetric, device="cuda")
    check_convolution([layer.packed], tile_of(*tile), "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("tile", TILES)
def test_fp8_is_the_references(tile: tuple[int, ...]) -> None:
    needs_hopper()
    check_fp8(tile_of(*tile), "cuda")


GROUPED = [(64, 128, 4, 2, 1, 3), (128, 64, 4, 2, 1, 3), (128, 128, 8, 3, 1, 1)]


@pytest.mark.gpu
@pytest.mark.parametrize("tile", GROUPED)
@pytest.mark.parametrize(("group", "k"), [(128, 128), (128, 64), (64, 64)])
def test_groups_are_the_references(tile: tuple[int, ...], group: int, k: int) -> None:
    needs_hopper()
    layer = random_layer(392, 400, bits=4, group_size=group, device="cuda")
    check_linear(unpack_weight([layer.packed]), tile_of(*tile, k=k), "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("tile", GROUPED)
def test_convolution_with_groups_is_the_references(tile: tuple[int, ...]) -> None:
    needs_hopper()
    layer = random_layer(200, 336, bits=4, group_size=128, taps=9, device="cuda")
    check_convolution(unpack_weight([layer.packed]), tile_of(*tile), "cuda")


PACKED = [(128, 128, 4, 3, 2, 2), (256, 128, 8, 3), (160, 128, 4, 3, 2, 2), (64, 128, 4, 4)]
#: Columns that share a multiplier, and columns: blocks of 32 bytes and of 64, also with a last one that is not full.
COLUMNS = [(None, 400), (None, 512), (32, 400), (64, 400), (64, 512), (128, 400), (128, 512), (256, 512)]


def four_bits(n: int, k: int, group: int | None, taps: int = 1, device: str = "cuda") -> list[PackedWeight]:
    return [random_layer(n, k, bits=4, group_size=group, taps=taps, multiplied=group is not None, device=device).packed]


@pytest.mark.gpu
@pytest.mark.parametrize("tile", PACKED)
@pytest.mark.parametrize(("group", "k"), COLUMNS)
def test_packed_is_the_references(tile: tuple[int, ...], group: int | None, k: int) -> None:
    needs_hopper()
    check_linear(four_bits(392, k, group), tile_of(*tile), "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("tile", PACKED[:2])
@pytest.mark.parametrize(("group", "c"), [(None, 320), (64, 336), (64, 384)])
def test_packed_convolution_is_the_references(tile: tuple[int, ...], group: int | None, c: int) -> None:
    needs_hopper()
    check_convolution(four_bits(200, c, group, 9), tile_of(*tile), "cuda")


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("tile", [(256, 64, 4, 3), (160, 128, 4, 2, 2, 2)])
@pytest.mark.parametrize(("group", "k"), COLUMNS)
def test_packed_interpreted(tile: tuple[int, ...], group: int | None, k: int) -> None:
    check_linear(four_bits(200, k, group, device="cpu"), tile_of(*tile), "cpu")


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("group", "c"), [(None, 320), (64, 336), (64, 384), (32, 64)])
def test_packed_convolution_interpreted(group: int | None, c: int) -> None:
    check_convolution(four_bits(136, c, group, 9, "cpu"), tile_of(128, 128, 4, 3, 2, 2), "cpu")


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("symmetric", [True, False])
def test_other_loops_interpreted(symmetric: bool) -> None:
    layer = random_layer(200, 400, bits=8, symmetric=symmetric)
    check_linear([layer.packed], tile_of(256, 160, 8, 3, 2), "cpu")
    layer = random_layer(136, 144, bits=8, taps=9, symmetric=symmetric)
    check_convolution([layer.packed], tile_of(128, 128, 4, 3, 2, 2), "cpu")
    if symmetric:
        check_fp8(tile_of(256, 128, 8, 3), "cpu")
    grouped = unpack_weight([random_layer(136, 336, bits=4, group_size=64, symmetric=symmetric).packed])
    check_linear(grouped, tile_of(128, 128, 4, 2, k=64), "cpu")


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("group", [None, 64])
def test_packed_layers_run_what_the_table_of_an_h100_says(group: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the operator that layers call."""
    from kernels._triton import gemm, hopper_launch

    entries, own = entries_of(Chip("NVIDIA H100 80GB HBM3", (9, 0), 132)), hopper_launch.linear_int8
    launched: list[Tile] = []

    def look(*args: Any) -> None:
        launched.append(args[-1])
        own(*args)

    monkeypatch.setattr(gemm, "tuned_tile", lambda device, op, shape: nearest(entries, op, shape))
    monkeypatch.setattr(hopper_launch, "linear_int8", look)
    x, weights = codes(300, 512, runs=3, device="cpu"), four_bits(1280, 512, group, device="cpu")
    got = linear_int(x, weights, Epilogue(torch.bfloat16), "triton")
    assert [tile.kernel for tile in launched] == [HOPPER]
    check(got, linear_int(x, weights, Epilogue(), "reference"))


def test_packed_weights_that_the_loop_does_not_take() -> None:
    from kernels._triton.hopper_launch import takes, takes_weights

    tile, none = tile_of(*PACKED[0]), EpilogueRows(None, None, None, None)
    assert takes_weights(four_bits(64, 512, 64, device="cpu"), tile)
    assert not takes_weights(four_bits(64, 512, 96, device="cpu"), tile)  # groups that steps cut
    scaled = random_layer(64, 512, bits=4, group_size=64).packed
    assert not takes_weights([scaled], tile)  # scales of groups
    some = random_layer(64, 512, bits=4, channel=torch.arange(64)).packed
    assert not takes_weights([some], tile)  # rows that name their channels
    weight, x = four_bits(64, 512, 64, device="cpu")[0], torch.zeros(64, 512, dtype=torch.int8)
    assert takes(x, weight.codes, none, 64, torch.bfloat16)
    residual = EpilogueRows(None, torch.zeros(64, 64), None, None)  # float32, which the buffer of outputs does not hold
    assert not takes(x, weight.codes, residual, 64, torch.bfloat16)
