from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels.affine import (
    dequantize_affine,
    fake_quantize_affine,
    quantize_affine,
)
from kernels.errors import KernelError
from quant_spec.enums import Granularity

ONE = torch.tensor(1.0)


def bits_of(x: Tensor) -> Tensor:
    """Float32 bit patterns, so that -0.0 and +0.0 differ."""
    return x.view(torch.int32)


# Every tie of the grid between -4 and 4: half goes to the even neighbour.
TIES = [
    (-3.5, -4),
    (-2.5, -2),
    (-1.5, -2),
    (-0.5, 0),
    (0.5, 0),
    (1.5, 2),
    (2.5, 2),
    (3.5, 4),
]


@pytest.mark.parametrize(("x", "code"), TIES)
@pytest.mark.parametrize("scale", [1.0, 0.25, 8.0])
def test_ties_round_half_to_even(x: float, code: int, scale: float) -> None:
    got = quantize_affine(torch.tensor([x * scale]), torch.tensor(scale), torch.tensor(0), -8, 7)
    assert got.tolist() == [code]


@pytest.mark.parametrize(("x", "code"), TIES)
@pytest.mark.parametrize("zero_point", [7, 8])
def test_ties_are_rounded_before_the_zero_point_is_added(x: float, code: int, zero_point: int) -> None:
    got = quantize_affine(torch.tensor([x]), ONE, torch.tensor(zero_point), 0, 15)
    assert got.tolist() == [code + zero_point]


def test_just_beside_a_tie_goes_to_the_nearer_code() -> None:
    half = torch.tensor(0.5)
    above, below = torch.nextafter(half, ONE), torch.nextafter(half, torch.tensor(0.0))
    got = quantize_affine(torch.stack([below, above, -below, -above]), ONE, torch.tensor(0), -8, 7)
    assert got.tolist() == [0, 1, 0, -1]


def test_division_is_not_a_multiplication_by_the_reciprocal() -> None:
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(4096, generator=generator) + 0.01
    x = scale * (torch.arange(4096) % 12 + 0.5)  # near ties, where the two differ
    by_division = torch.round(x / scale)
    assert not torch.equal(by_division, torch.round(x * (1 / scale)))
    assert torch.equal(quantize_affine(x, scale, torch.tensor(0), 0, 15).float(), by_division)


def test_values_beyond_the_grid_saturate() -> None:
    x = torch.tensor([-1e30, float("-inf"), -9.0, 8.0, 1e30, float("inf")])
    assert quantize_affine(x, ONE, torch.tensor(0), -8, 7).tolist() == [-8, -8, -8, 7, 7, 7]
    assert fake_quantize_affine(x, ONE, torch.tensor(0), -8, 7).tolist() == [-8, -8, -8, 7, 7, 7]


def test_quotients_that_overflow_saturate() -> None:
    x, scale = torch.tensor([3e38, -3e38]), torch.tensor(1e-30)
    assert quantize_affine(x, scale, torch.tensor(3), 0, 15).tolist() == [15, 0]


@pytest.mark.parametrize(("quant_min", "quant_max"), [(0, 255), (-128, 127), (0, 3), (-8, 7), (5, 5)])
def test_every_code_is_a_fixed_point(quant_min: int, quant_max: int) -> None:
    codes = torch.arange(quant_min, quant_max + 1)
    codes = codes.to(torch.uint8 if quant_min >= 0 else torch.int8)
    for zero_point in (quant_min, (quant_min + quant_max) // 2, quant_max):
        for scale in (0.1, 3.0, 1e-20):
            point, step = torch.tensor(zero_point), torch.tensor(scale)
            values = dequantize_affine(codes, step, point)
            again = quantize_affine(values, step, point, quant_min, quant_max)
            assert again.dtype == codes.dtype
            assert torch.equal(again, codes)


def test_dequantize_is_the_formula_in_float32() -> None:
    codes = torch.tensor([0, 7, 15], dtype=torch.uint8)
    got = dequantize_affine(codes, torch.tensor(0.1), torch.tensor(7, dtype=torch.uint8))
    assert got.dtype == torch.float32
    assert torch.equal(got, torch.tensor([-7.0, 0.0, 8.0]) * torch.tensor(0.1))


def test_zero_is_positive_zero() -> None:
    x = torch.tensor([-0.0, -0.3, 0.0, 0.3])
    for zero_point in (torch.tensor(0), torch.tensor(-0.0), torch.tensor(5)):
        got = fake_quantize_affine(x, ONE, zero_point, 0, 15)
        assert bits_of(got).tolist() == [0, 0, 0, 0]


def test_nan_stays_visible_in_fake_quantize() -> None:
    assert fake_quantize_affine(torch.tensor([float("nan")]), ONE, torch.tensor(0), 0, 15).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_computed_in_float32(dtype: torch.dtype) -> None:
    x = torch.linspace(-2, 2, 63).to(dtype)
    got = fake_quantize_affine(x, torch.tensor(0.13, dtype=torch.float16), torch.tensor(8), 0, 15)
    assert got.dtype == torch.float32
    want = fake_quantize_affine(x.float(), torch.tensor(0.13, dtype=torch.float16).float(), torch.tensor(8), 0, 15)
    assert torch.equal(got, want)


@pytest.mark.parametrize("n", [1, 63, 1000])
@pytest.mark.parametrize("granularity", list(Granularity))
@pytest.mark.parametrize(("quant_min", "quant_max"), [(0, 15), (-128, 127)])
def test_fake_quantize_equals_the_round_trip(n: int, granularity: Granularity, quant_min: int, quant_max: int) -> None:
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(5, n, generator=generator) * 3
    shape = {Granularity.PER_TENSOR: (1, 1), Granularity.PER_CHANNEL: (5, 1), Granularity.PER_GROUP: (5, n)}[
        granularity
    ]
    scale = torch.rand(shape, generator=generator) * 0.1 + 1e-2
    zero_point = torch.randint(quant_min, quant_max + 1, shape, generator=generator)
    for value in (x, x.t().contiguous().t(), x.repeat_interleave(2, dim=1)[:, ::2]):
        kept = value.clone()
        codes = quantize_affine(value, scale, zero_point, quant_min, quant_max)
        got = fake_quantize_affine(value, scale, zero_point, quant_min, quant_max)
        assert torch.equal(bits_of(got), bits_of(dequantize_affine(codes, scale, zero_point)))
        assert torch.equal(value, kept)
        inside = (codes > quant_min) & (codes < quant_max)
        assert ((got - value).abs() <= scale * 0.5001)[inside].all()


@given(
    values=st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=20),
    scale=st.floats(min_value=2.0**-60, max_value=2.0**60, width=32),
    bits=st.integers(2, 8),
    signed=st.booleans(),
    offset=st.integers(0, 255),
)
def test_fake_quantize_equals_the_round_trip_property(
    values: list[float], scale: float, bits: int, signed: bool, offset: int
) -> None:
    quant_min = -(1 << (bits - 1)) if signed else 0
    quant_max = quant_min + (1 << bits) - 1
    x, step = torch.tensor(values), torch.tensor(scale)
    zero_point = torch.tensor(quant_min + offset % (1 << bits))
    codes = quantize_affine(x, step, zero_point, quant_min, quant_max)
    assert int(codes.min()) >= quant_min
    assert int(codes.max()) <= quant_max
    got = fake_quantize_affine(x, step, zero_point, quant_min, quant_max)
    assert torch.equal(bits_of(got), bits_of(dequantize_affine(codes, step, zero_point)))


def test_gradients_flow_to_the_scale_of_dequantize() -> None:
    x = torch.tensor([1.4, -0.6])
    scale = torch.tensor(1.0, requires_grad=True)
    fake_quantize_affine(x, scale, torch.tensor(0), -8, 7).sum().backward()
    assert scale.grad is not None
    assert scale.grad.item() == 0.0  # codes 1 and -1, and rounding itself has no gradient


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_scales_are_refused(bad: float) -> None:
    with pytest.raises(KernelError, match=f"scale: got {bad}, wanted finite values above 0"):
        quantize_affine(torch.zeros(2), torch.tensor([1.0, bad]), torch.tensor(0), 0, 15)


@pytest.mark.parametrize(("quant_min", "quant_max"), [(0, 256), (-129, 0), (-1, 200), (3, 2)])
def test_ranges_beyond_eight_bits_are_refused(quant_min: int, quant_max: int) -> None:
    for call in (quantize_affine, fake_quantize_affine):
        with pytest.raises(KernelError, match=rf"code range: got \[{quant_min}, {quant_max}\]"):
            call(torch.zeros(2), ONE, torch.tensor(0), quant_min, quant_max)


def test_parameters_that_would_change_the_shape_are_refused() -> None:
    x = torch.zeros(3, 4)
    for bad in (torch.ones(3), torch.ones(1, 3, 4), torch.ones(2, 1)):
        with pytest.raises(KernelError, match="scale: got shape"):
            fake_quantize_affine(x, bad, torch.tensor(0), 0, 15)
        with pytest.raises(KernelError, match="zero_point: got shape"):
            dequantize_affine(x.to(torch.uint8), ONE, bad)
