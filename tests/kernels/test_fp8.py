from __future__ import annotations

import pytest
import torch

from kernels.epilogue import Epilogue, LowRank
from kernels.errors import KernelError
from kernels.fp8 import FP8, FP8_TOLERANCE, Fp8Matrix, linear_fp8, quantize_fp8

BACKENDS = ("reference", "triton")


def needs_e4m3() -> None:
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no E4M3")


def test_ties_subnormals_and_extremes(device: str) -> None:
    needs_e4m3()
    # With 448 in the row the scale is 1. E4M3 has steps of 2 from 16 on, of 2**-9 below 2**-6.
    x = torch.tensor([[448.0, 17.0, 19.0, 2.0**-10, 3 * 2.0**-10, -0.0, 15.5, 2.0**-11]], device=device)
    for backend in BACKENDS:
        got = quantize_fp8(x, backend)
        assert got.scale.tolist() == [1.0]
        assert got.values.float().tolist() == [[448.0, 16.0, 20.0, 0.0, 2.0**-8, 0.0, 16.0, 0.0]]


@pytest.mark.parametrize("shape", [(1, 1), (3, 5, 63), (7, 2100)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_conversion_equals_its_twin(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    needs_e4m3()
    g = torch.Generator().manual_seed(shape[-1])
    x = (torch.randn(shape, generator=g) * torch.logspace(-4, 2, shape[-1])).to(device, dtype)
    left, right = (quantize_fp8(x, backend) for backend in BACKENDS)
    assert left.values.dtype == right.values.dtype == FP8
    assert torch.equal(left.values.view(torch.uint8), right.values.view(torch.uint8))
    assert torch.equal(left.scale, right.scale)


# The interpreter is numpy, which warns of what a GPU does silently.
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("odd", [float("inf"), -float("inf"), float("nan")])
def test_what_is_not_finite_shows_in_the_scale(odd: float, device: str) -> None:
    needs_e4m3()
    x = torch.ones(3, 70, device=device)
    x[1, 65] = odd
    for backend in BACKENDS:
        assert quantize_fp8(x, backend).scale.isfinite().tolist() == [True, False, True], backend


@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (35, 33, 100)])
def test_products_are_those_of_the_values(m: int, n: int, k: int, device: str) -> None:
    needs_e4m3()
    g = torch.Generator().manual_seed(m)
    x = quantize_fp8(torch.randn(m, k, generator=g))
    weight = quantize_fp8(torch.randn(n, k, generator=g))
    bias, residual = torch.randn(n, generator=g), torch.randn(m, n, generator=g)
    hidden, up = torch.randn(m, 5, generator=g), torch.randn(n, 5, generator=g)
    left = x.values.double() * x.scale[:, None]
    right = weight.values.double() * weight.scale[:, None]
    want = left @ right.t() + bias + residual + hidden @ up.t()
    terms = left.abs() @ right.abs().t() + bias.abs() + residual.abs() + hidden.abs() @ up.abs().t()
    low_rank = LowRank(hidden.to(device), up.to(device))
    epilogue = Epilogue(torch.float32, bias.to(device), residual.to(device), low_rank)
    for backend in BACKENDS:
        left_there, right_there = (Fp8Matrix(a.values.to(device), a.scale.to(device)) for a in (x, weight))
        got = linear_fp8(left_there, right_there, epilogue, backend)
        assert bool(((got.cpu() - want).abs() <= FP8_TOLERANCE * terms).all()), backend


def test_what_does_not_fit_is_refused() -> None:
    x = quantize_fp8(torch.ones(2, 5))
    with pytest.raises(KernelError, match=r"fp8: got \(2, 5\) and \(2, 4\)"):
        linear_fp8(x, quantize_fp8(torch.ones(2, 4)), Epilogue())
    with pytest.raises(KernelError, match="got an empty tensor"):
        quantize_fp8(torch.ones(0, 4))
