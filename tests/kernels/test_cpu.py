from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import cpu_weight, native
from kernels.activations import ActivationTable, QuantizedActivation, quantize_by_table, quantize_dynamic
from kernels.backend import BackendUnavailableError
from kernels.conv import ConvGeometry, conv2d_int
from kernels.cpu import CONV_TOLERANCE, cpu_conv2d, cpu_linear
from kernels.cpu_activation import (
    cpu_grid,
    pad_codes,
    position_sums,
    quantize_cpu,
    quantize_cpu_dynamic,
)
from kernels.cpu_weight import PAIR_LIMIT, CpuWeight, pack_cpu_weight, sums_pairs_exactly
from kernels.epilogue import Epilogue, LowRank
from kernels.errors import KernelError
from kernels.gemm import EPILOGUE_TOLERANCE, linear_int
from kernels.packing import pack_codes
from kernels.weights import PackedWeight, pack_weight, weight_integers
from tests.kernels.example_layers import Layer, random_layer, weight_values

GEOMETRIES = (
    ConvGeometry((3, 3), padding=(1, 1)),
    ConvGeometry((3, 3), (2, 2), (1, 1)),
    ConvGeometry((1, 1)),
    ConvGeometry((3, 2), (2, 1), (0, 2), (1, 2)),
)


@pytest.fixture(params=["compiled", "no small products", "plain", "oneDNN's Linear"], autouse=True)
def ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what an installation has compiled and without, and with small weights laid out as large ones are."""
    if request.param == "plain":
        monkeypatch.setattr(native, "_native", None)
    elif not native.is_built():
        pytest.skip("this installation has no compiled part")
    if request.param in ("no small products", "oneDNN's Linear"):
        monkeypatch.setattr(cpu_weight, "SMALL_PRODUCT", 0)
    if request.param == "oneDNN's Linear":
        monkeypatch.setattr(cpu_weight, "SMALL_MATRIX", 0)


def packed(*arguments: Any) -> CpuWeight:
    """Pack a weight; where this CPU has no exact products for one so large, the test is skipped."""
    try:
        return pack_cpu_weight(*arguments)
    except BackendUnavailableError as error:
        if sums_pairs_exactly() or all(is_small(weight) for weight in arguments[0]):
            raise
        pytest.skip(str(error))


def is_small(weight: PackedWeight) -> bool:
    """Whether no CPU's int8 products saturate with a weight, as it is stored."""
    return weight.layout.scales == 1 and int(weight_integers(weight).abs().max()) <= PAIR_LIMIT


def codes(*shape: int, runs: int) -> tuple[QuantizedActivation, QuantizedActivation]:
    """The same activation as the CPU and as the reference store it; with its extremes side by side."""
    g = torch.Generator().manual_seed(sum(shape))
    unsigned = torch.randint(0, 256, shape, generator=g, dtype=torch.uint8)
    unsigned[0], unsigned[-1] = 255, 0
    zero = torch.randint(0, 256, (runs,), generator=g, dtype=torch.int32)
    signed = (unsigned.int() - 128).to(torch.int8)
    ones = torch.ones(runs)
    return QuantizedActivation(unsigned, ones, zero, False), QuantizedActivation(signed, ones, zero - 128, False)


@pytest.mark.parametrize("bits", [1, 2, 4, 6, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("shape", "runs"), [((1, 1), 1), ((6, 63), 3), ((2, 5, 128), 2)])
def test_linear_sums_are_the_references_integers(bits: int, symmetric: bool, shape: tuple[int, ...], runs: int) -> None:
    layer = random_layer(35, shape[-1], bits=bits, symmetric=symmetric, unit_scale=True)
    x, same = codes(*shape, runs=runs)
    want = linear_int(same, [layer.packed], Epilogue())
    assert want.abs().max() < 2**24
    assert torch.equal(cpu_linear(x, packed([layer.packed]), Epilogue()), want)


def test_rows_may_have_any_leading_dimensions() -> None:
    """Of asymmetric 8-bit weights, which need each row's sum, and too many for a `SmallMatrix`.

    As they are stored, code - 128, no CPU's products of them saturate.
    """
    stored = torch.randint(128 - PAIR_LIMIT, 128 + PAIR_LIMIT, (260, 256), generator=torch.Generator().manual_seed(0))
    zero = torch.zeros(260, 1, dtype=torch.uint8)
    layer = pack_weight(pack_codes(stored.to(torch.uint8), 8), torch.ones(260, 1), zero, bits=8, channels=256)
    x, same = codes(2, 3, 4, 256, runs=2)
    weight = pack_cpu_weight([layer])
    assert weight.correction is not None
    assert isinstance(weight.packed, Tensor)
    want = linear_int(same, [layer], Epilogue())
    assert want.abs().max() < 2**24
    assert torch.equal(cpu_linear(x, weight, Epilogue()), want)


def test_small_matrices_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    small, large = (random_layer(256, channels, bits=4).packed for channels in (256, 257))
    assert isinstance(pack_cpu_weight([small]).packed, cpu_weight.SmallMatrix)
    assert isinstance(pack_cpu_weight([large]).packed, Tensor)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize(("bits", "symmetric"), [(4, False), (8, True), (8, False)])
def test_conv_sums_are_the_references_integers(geometry: ConvGeometry, bits: int, symmetric: bool) -> None:
    layer = random_layer(19, 24, bits=bits, taps=geometry.taps, symmetric=symmetric, unit_scale=True)
    for runs in (1, 2):
        x, same = codes(2, 7, 6, 24, runs=runs)
        want = conv2d_int(same, [layer.packed], geometry, Epilogue())
        got = cpu_conv2d(x, packed([layer.packed], geometry), Epilogue())
        assert got.is_contiguous()
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_whole_epilogue_on_mixed_bits(dtype: torch.dtype, bits: int) -> None:
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    parts = [
        random_layer(15, 40, bits=b, channel=rows).packed for rows, b in zip(order.split(15), (bits, 4), strict=True)
    ]
    x, same = codes(4, 40, runs=2)
    g = torch.Generator().manual_seed(1)
    low_rank = LowRank(torch.randn(4, 5, generator=g), torch.randn(30, 5, generator=g))
    for epilogue in (
        Epilogue(dtype, bias=torch.randn(30, generator=g)),
        Epilogue(dtype, torch.randn(30, generator=g), torch.randn(4, 30, generator=g), low_rank),
    ):
        want, got = linear_int(same, parts, epilogue), cpu_linear(x, packed(parts), epilogue)
        assert got.dtype == dtype
        limit = EPILOGUE_TOLERANCE * 40 * 255 * 26 + torch.finfo(dtype).eps * want.float().abs()
        assert bool(((got.float() - want.float()).abs() <= limit).all())


@pytest.mark.parametrize(("bits", "spread", "digits"), [(4, 1.0, 2), (4, 7.9, 2), (4, 1000.0, 3), (8, 4.0, 3)])
def test_scales_per_group_are_whole_numbers_in_digits(bits: int, spread: float, digits: int) -> None:
    layer = random_layer(9, 128, bits=bits, group_size=32)
    layer.packed.scale[:, 1] = layer.packed.scale[:, 0] * spread
    layer.packed.scale[:, 2:] = layer.packed.scale[:, :1]
    weight = packed([layer.packed])
    assert weight.digits == digits
    x = QuantizedActivation(torch.eye(128, dtype=torch.uint8), torch.ones(1), torch.zeros(1, dtype=torch.int32), False)
    # One weight an output, so nothing is rounded: bit for bit the artifact's weight.
    assert torch.equal(cpu_linear(x, weight, Epilogue()).t(), weight_values(layer.packed)[:, 0])


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_convolutions_with_scales_per_group(geometry: ConvGeometry) -> None:
    layer = random_layer(19, 72, bits=4, taps=geometry.taps, group_size=32)
    for runs in (1, 2):
        x, same = codes(2, 7, 6, 72, runs=runs)
        g = torch.Generator().manual_seed(2)
        epilogue = Epilogue(bias=torch.randn(19, generator=g))
        want = conv2d_int(same, [layer.packed], geometry, epilogue)
        got = cpu_conv2d(x, packed([layer.packed], geometry), epilogue)
        magnitude = float(weight_values(layer.packed).abs().flatten(1).sum(1).max()) * 255
        assert float((got - want).abs().max()) <= EPILOGUE_TOLERANCE * magnitude


@pytest.mark.parametrize("bits", [4, 6])
def test_multiplied_groups_are_one_digit(bits: int) -> None:
    """Bit for bit what the reference gives, in one int8 matrix; sums stay below 2**24."""
    layer = random_layer(35, 96, bits=bits, group_size=32, unit_scale=True, multiplied=True)
    x, same = codes(6, 96, runs=3)
    weight = packed([layer.packed])
    assert (weight.digits, weight.correction) == (1, None)
    assert torch.equal(cpu_linear(x, weight, Epilogue()), linear_int(same, [layer.packed], Epilogue()))


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_convolutions_with_multiplied_groups(geometry: ConvGeometry) -> None:
    layer = random_layer(19, 40, bits=4, taps=geometry.taps, group_size=32, unit_scale=True, multiplied=True)
    x, same = codes(2, 7, 6, 40, runs=2)
    weight = packed([layer.packed], geometry)
    assert weight.digits == 1
    want = conv2d_int(same, [layer.packed], geometry, Epilogue())
    magnitude = weight_values(layer.packed).abs().flatten(1).sum(1) * 255
    assert bool(((cpu_conv2d(x, weight, Epilogue()) - want).abs() <= CONV_TOLERANCE * magnitude).all())


@pytest.mark.parametrize("residual", [False, True])
def test_sums_that_nearly_cancel_stay_within_the_tolerance_of_unsigned_codes(residual: bool) -> None:
    """Codes near a large zero point and weights of one sign: what oneDNN adds up is far above what is left."""
    geometry, draw = GEOMETRIES[0], torch.Generator().manual_seed(3)
    layer = random_layer(24, 320, bits=6, taps=9)
    unsigned = (128 + torch.randint(-3, 4, (2, 5, 5, 320), generator=draw)).to(torch.uint8)
    scale, zero = torch.tensor([0.037]), torch.tensor([128], dtype=torch.int32)
    x = QuantizedActivation(unsigned, scale, zero, False)
    same = QuantizedActivation((unsigned.int() - 128).to(torch.int8), scale, zero - 128, False)
    epilogue = Epilogue(residual=torch.randn(2, 5, 5, 24, generator=draw) if residual else None)
    want = conv2d_int(same, [layer.packed], geometry, epilogue)
    got = cpu_conv2d(x, packed([layer.packed], geometry), epilogue)
    magnitude = weight_values(layer.packed).abs().flatten(1).sum(1) * 131 * 0.037
    assert bool(((got - want).abs() <= CONV_TOLERANCE * magnitude).all())


def test_scales_too_far_apart_are_refused() -> None:
    layer = random_layer(9, 128, bits=4, group_size=32)
    layer.packed.scale[3, 1] = layer.packed.scale[3, 0] * 1e6
    with pytest.raises(KernelError, match="wanted weights that 3 int8 digits hold"):
        pack_cpu_weight([layer.packed])


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_are_the_references(bits: int) -> None:
    x = torch.randn(3, 5, 17, generator=torch.Generator().manual_seed(0)) * 3
    half = 2 ** (bits - 1)
    divisor = torch.rand(2, 17, generator=torch.Generator().manual_seed(1)) + 0.02
    divisor[1, 3] = torch.inf
    factor = divisor[0]
    table = ActivationTable(torch.tensor([0.03, 0.2]), torch.tensor([1.0, half]), bits, divisor=divisor)
    pairs = [
        (quantize_cpu(x, cpu_grid(table, index), table.bits), quantize_by_table(x, table, index))
        for index in (torch.tensor(1), torch.tensor([0, 1, 1]))
    ]
    pairs += [
        (
            quantize_cpu_dynamic(x, bits, symmetric=s, channel_scale=each),
            quantize_dynamic(x, bits, symmetric=s, per_token=False, channel_scale=each),
        )
        for s in (True, False)
        for each in (None, factor)
    ]
    for got, want in pairs:
        assert got.codes.dtype == torch.uint8
        assert torch.equal(got.codes.int() - half, want.codes.int())
        assert torch.equal(got.scale, want.scale)
        assert torch.equal(got.zero_point - half, want.zero_point)


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (2, 40, 40, 48), (1, 3, 300, 96)], ids=str)
def test_images_are_padded_with_their_zero_point(shape: tuple[int, ...]) -> None:
    """In one piece, by rows, and by parts of rows."""
    table = ActivationTable(torch.tensor([0.03]), torch.tensor([37.0]), 8)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    got = quantize_cpu(x, cpu_grid(table), 8, with_sums=True, padding=(2, 1))
    plain = quantize_by_table(x, table)
    inside = got.codes[:, 2:-2, 1:-1]
    assert torch.equal(inside.int() - 128, plain.codes.int())
    assert got.codes.sum() == inside.sum() + 37 * (got.codes.numel() - inside.numel())
    assert bool((got.codes[:, :2] == 37).all())
    assert torch.equal(got.codes, pad_codes(quantize_cpu(x, cpu_grid(table), 8), (2, 1)).codes)
    sums, left_out = position_sums(got)
    if left_out == (0, 0):
        assert sums.sum() == sums[:, 2:-2, 1:-1].sum()
        sums = sums[:, 2:-2, 1:-1]
    assert torch.equal(sums, (inside.float() - 37).sum(-1))


def test_weights_are_ordered_anew_for_other_images(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """oneDNN's own report says whether a call rearranges weights, which takes longer than to convolve."""
    monkeypatch.setattr(cpu_weight, "SMALL_PRODUCT", 0)
    layer, geometry = random_layer(48, 48, bits=8, taps=9, unit_scale=True), GEOMETRIES[0]
    weight = packed([layer.packed], geometry)
    for size in (8, 16, 8):
        x, same = codes(1, size, size, 48, runs=1)
        want = conv2d_int(same, [layer.packed], geometry, Epilogue())
        assert torch.equal(cpu_conv2d(x, weight, Epilogue()), want)
        capfd.readouterr()
        with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
            cpu_conv2d(x, weight, Epilogue())
        report = capfd.readouterr().out
        assert ",convolution," in report
        assert ",reorder," not in report


def test_what_does_not_fit_is_refused() -> None:
    layer = random_layer(4, 8, bits=4)
    x, same = codes(3, 8, runs=1)
    weight = packed([layer.packed])
    with pytest.raises(KernelError, match=r"got torch.int8 of 8 channels, wanted torch.uint8 of 8"):
        cpu_linear(same, weight, Epilogue())
    with pytest.raises(KernelError, match="wanted \\(B, H, W, C\\) and a Conv2d's weight"):
        cpu_conv2d(x, weight, Epilogue())
    with pytest.raises(KernelError, match="got 2 grids for 3 samples"):
        cpu_linear(
            QuantizedActivation(x.codes, torch.ones(2), torch.zeros(2, dtype=torch.int32), False), weight, Epilogue()
        )


def largest(layer: Layer) -> Tensor:
    """|code - zero_point| at most."""
    return layer.integers(64, None).abs().max()


SATURATING = """
import torch
from kernels.activations import QuantizedActivation
from kernels.backend import BackendUnavailableError
from kernels.cpu import cpu_linear
from kernels.cpu_weight import pack_cpu_weight, sums_pairs_exactly
from kernels.epilogue import Epilogue
from kernels.gemm import linear_int
from kernels.native import product_level
from tests.kernels.test_cpu import codes, random_layer
assert not sums_pairs_exactly()
x, same = codes(4, 64, runs=1)
small = random_layer(16, 64, bits=6, symmetric=True, unit_scale=True).packed
assert torch.equal(cpu_linear(x, pack_cpu_weight([small]), Epilogue()), linear_int(same, [small], Epilogue()))
large = random_layer(16, 64, bits=8, symmetric=True, unit_scale=True).packed
if product_level():
    assert torch.equal(cpu_linear(x, pack_cpu_weight([large]), Epilogue()), linear_int(same, [large], Epilogue()))
try:
    pack_cpu_weight([random_layer(16, 62, bits=8, symmetric=True).packed])
except BackendUnavailableError as error:
    print(error)
"""


@pytest.mark.parametrize("ways", ["plain"], indirect=True)  # which a process of its own does not see
def test_a_cpu_whose_products_saturate_multiplies_small_weights_or_has_a_product_of_our_own() -> None:
    assert largest(random_layer(16, 64, bits=6, symmetric=True)) <= PAIR_LIMIT
    isa = {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"} if sums_pairs_exactly() else {}
    environment = {**os.environ, **isa, "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, "-c", SATURATING], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "weights up to 128 on a CPU without VNNI or AMX" in done.stdout
