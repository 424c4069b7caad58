from __future__ import annotations

import importlib
import mmap

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.activations import QuantizedActivation
from kernels.conv import ConvGeometry, conv2d_int
from kernels.epilogue import Epilogue, LowRank
from kernels.errors import KernelError
from kernels.gemm import EPILOGUE_TOLERANCE
from kernels.weights import join_widths
from tests.kernels.example_layers import mixed_layer, random_layer

BACKENDS = ("reference", "triton")
SAME = ConvGeometry((3, 3), padding=(1, 1))
GEOMETRIES = (
    SAME,
    ConvGeometry((3, 3), (2, 2), (1, 1)),
    ConvGeometry((1, 1)),
    ConvGeometry((1, 1), (2, 2)),
    ConvGeometry((3, 2), (2, 1), (0, 2), (1, 2)),
)


def image(shape: tuple[int, ...], runs: int, *, unit_scale: bool = True) -> QuantizedActivation:
    g = torch.Generator().manual_seed(sum(shape))
    codes = torch.randint(-128, 128, shape, generator=g, dtype=torch.int8)
    scale = torch.ones(runs) if unit_scale else torch.rand(runs, generator=g) + 0.1
    return QuantizedActivation(codes, scale, torch.randint(-128, 128, (runs,), generator=g, dtype=torch.int32), False)


def to(x: QuantizedActivation, device: str) -> QuantizedActivation:
    return QuantizedActivation(x.codes.to(device), x.scale.to(device), x.zero_point.to(device), x.symmetric)


def convolve(x: QuantizedActivation, integers: Tensor, geometry: ConvGeometry) -> Tensor:
    """The definition: torch's convolution of code - zero_point, padded with zeros, exact in float64."""
    whole = (x.codes.double() - x.zero_point.view(-1, 1, 1, 1)).permute(0, 3, 1, 2)
    weight = integers.double().view(len(integers), *geometry.kernel, -1).permute(0, 3, 1, 2)
    out = F.conv2d(whole, weight, None, geometry.stride, geometry.padding, geometry.dilation)
    return out.permute(0, 2, 3, 1).long()


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize(
    ("bits", "group_size"),
    [(8, None), (8, 32), (4, None), (4, 32), pytest.param(4, 64, marks=pytest.mark.slow), (2, None)],
)
def test_sums_are_the_definitions_integers(
    geometry: ConvGeometry, bits: int, group_size: int | None, device: str
) -> None:
    channels = 40 if group_size is None else 70
    layer = random_layer(
        35, channels, bits=bits, group_size=group_size, taps=geometry.taps, unit_scale=True, symmetric=bits == 8
    )
    x = image((2, 4, 3, channels), 2)
    want = convolve(x, layer.integers(channels, group_size), geometry)
    assert int(want.abs().max()) < 2**24
    for backend in BACKENDS:
        got = conv2d_int(to(x, device), [layer.packed.to(device)], geometry, Epilogue(), backend)
        assert torch.equal(got.cpu().long(), want), backend


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_multiplied_groups_are_one_sum(geometry: ConvGeometry, device: str) -> None:
    layer = random_layer(35, 70, bits=4, group_size=32, taps=geometry.taps, unit_scale=True, multiplied=True)
    x = image((2, 6, 5, 70), 2)
    want = convolve(x, layer.integers(70, 32), geometry).float()  # sums in int32 are rounded to float32 once
    for backend in BACKENDS:
        got = conv2d_int(to(x, device), [layer.packed.to(device)], geometry, Epilogue(), backend)
        assert torch.equal(got.cpu(), want), backend


@pytest.mark.parametrize("geometry", [SAME, ConvGeometry((1, 1))], ids=str)
def test_asymmetric_weights_of_8_bits(geometry: ConvGeometry, device: str) -> None:
    layer = random_layer(5, 21, bits=8, taps=geometry.taps, unit_scale=True)
    x = image((1, 4, 3, 21), 1)
    want = convolve(x, layer.integers(21, None), geometry)
    for backend in BACKENDS:
        got = conv2d_int(to(x, device), [layer.packed.to(device)], geometry, Epilogue(), backend)
        assert torch.equal(got.cpu().long(), want), backend


def test_padding_is_zero_whatever_the_zero_point(device: str) -> None:
    layer = random_layer(3, 8, bits=4, taps=9, unit_scale=True)
    for zero in (-128, 0, 127):
        blank = torch.full((1, 2, 2, 8), zero, dtype=torch.int8)
        x = QuantizedActivation(blank, torch.ones(1), torch.tensor([zero], dtype=torch.int32), False)
        for backend in BACKENDS:
            got = conv2d_int(to(x, device), [layer.packed.to(device)], SAME, Epilogue(), backend)
            assert not got.any(), (zero, backend)


def test_epilogue_and_mixed_bits(device: str) -> None:
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    parts = [
        random_layer(rows.numel(), 33, bits=bits, taps=9, group_size=group, channel=rows)
        for rows, bits, group in zip(order.split((8, 12)), (8, 4), (None, 32), strict=True)
    ]
    x = image((2, 4, 3, 33), 2, unit_scale=False)
    g = torch.Generator().manual_seed(1)
    residual, hidden = torch.randn(2, 4, 3, 20, generator=g), torch.randn(2, 4, 3, 7, generator=g)
    bias, up = torch.randn(20, generator=g), torch.randn(20, 7, generator=g)
    weights = [part.packed for part in parts]
    want = conv2d_int(x, weights, SAME, Epilogue(), "reference") + bias + hidden @ up.t() + residual
    epilogue = Epilogue(torch.float32, bias.to(device), residual.to(device), LowRank(hidden.to(device), up.to(device)))
    for backend in BACKENDS:
        got = conv2d_int(to(x, device), [weight.to(device) for weight in weights], SAME, epilogue, backend)
        assert (got.cpu() - want).abs().max() <= EPILOGUE_TOLERANCE * want.abs().max(), backend


@pytest.mark.parametrize("geometry", [SAME, GEOMETRIES[4]], ids=str)
@pytest.mark.parametrize(("widths", "multiplied"), [((1, 3, 4, 5, 8), False), ((2, 4, 6), True)])
def test_all_widths_of_a_layer_are_one_launch(
    geometry: ConvGeometry, widths: tuple[int, ...], multiplied: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    conv = importlib.import_module("kernels._triton.conv")
    monkeypatch.setattr(conv, "conv2d_int_kernel", None)
    parts = mixed_layer(70, widths, group_size=32 if multiplied else None, taps=geometry.taps, multiplied=multiplied)
    weights = [each.to(device) for each in join_widths(parts)]
    x = to(image((2, 5, 4, 70), 2, unit_scale=False), device)
    want, got = (conv2d_int(x, weights, geometry, Epilogue(), backend) for backend in BACKENDS)
    assert torch.equal(got, want)


def test_images_may_be_strided_and_far_apart(device: str) -> None:
    layer = random_layer(6, 16, bits=8, taps=9, unit_scale=True, symmetric=True)
    base = image((3, 9, 11, 32), 1)
    views = [base.codes[:, 1:7, ::2, 3:19], base.codes[:, :5, :6].transpose(1, 2)[..., :16], base.codes[..., ::2]]
    if not torch.cuda.is_available():
        far = torch.frombuffer(mmap.mmap(-1, 3 * 2**30), dtype=torch.int8)
        views.append(far.as_strided((3, 4, 5, 16), (2**30, 80, 16, 1)).copy_(base.codes[:, :4, :5, :16]))
        # One image that spans more than 32-bit offsets reach: it is copied.
        views.append(far.as_strided((1, 3, 5, 16), (1, 2**30, 16, 1)).copy_(base.codes[:1, :3, :5, :16]))
    for codes in views:
        x = QuantizedActivation(codes, base.scale, base.zero_point, False)
        want = convolve(x, layer.integers(16, None), SAME)
        got = conv2d_int(to(x, device), [layer.packed.to(device)], SAME, Epilogue(), "triton")
        assert torch.equal(got.cpu().long(), want)


def test_what_does_not_fit_is_refused() -> None:
    layer, x = random_layer(3, 8, bits=4, taps=9), image((2, 4, 4, 8), 2)
    with pytest.raises(KernelError, match="got 9 taps of 8 channels, wanted 1 of 8"):
        conv2d_int(x, [layer.packed], ConvGeometry((1, 1)), Epilogue())
    with pytest.raises(KernelError, match=r"got codes \(4, 4, 8\)"):
        conv2d_int(QuantizedActivation(x.codes[0], x.scale, x.zero_point, False), [layer.packed], SAME, Epilogue())
    with pytest.raises(KernelError, match="got an image of 2 x 2, wanted one that"):
        conv2d_int(image((1, 2, 2, 8), 1), [layer.packed], ConvGeometry((3, 3)), Epilogue())
    with pytest.raises(KernelError, match="wanted sizes of 1 or more"):
        ConvGeometry((3, 3), (0, 1))


@pytest.mark.gpu
@pytest.mark.parametrize(("bits", "group_size"), [(8, None), (4, None), (4, 64)])
def test_real_sizes_on_a_gpu(bits: int, group_size: int | None) -> None:
    layer = random_layer(320, 320, bits=bits, group_size=group_size, taps=9).packed.to("cuda")
    x = to(image((2, 64, 64, 320), 2, unit_scale=False), "cuda")
    reference, triton = (conv2d_int(x, [layer], SAME, Epilogue(), backend) for backend in BACKENDS)
    assert (reference - triton).abs().max() <= EPILOGUE_TOLERANCE * reference.abs().max()
