"""Which product of E4M3 numbers runs, as it was timed. What a clock says decides nothing here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import fp8
from kernels.epilogue import Epilogue
from kernels.fp8 import FP8, FP8_TOLERANCE, Fp8Matrix, linear_fp8, linear_fp8_library, quantize_fp8
from kernels.fp8_measure import Fp8Timing, Fp8Timings, chosen_fp8, fp8_timings, measured_fp8

BF16 = torch.bfloat16
# Rounding an output, and a bias before, to bfloat16.
ROUNDING = 2.0**-8


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def matrices(m: int = 37, n: int = 48, k: int = 64) -> tuple[Fp8Matrix, Fp8Matrix]:
    """Rows with scales of their own, and a weight with scales of its channels."""
    return quantize_fp8(noise(m, k) * torch.linspace(0.1, 9, m)[:, None], "reference"), quantize_fp8(
        noise(n, k) * torch.linspace(0.5, 2, n)[:, None], "reference"
    )


def timings(*pairs: tuple[float, float]) -> tuple[Fp8Timing, ...]:
    return tuple(Fp8Timing(256 * 4**i, own, library) for i, (own, library) in enumerate(pairs))


@pytest.mark.parametrize(
    ("found", "switches", "said"),
    [
        (timings((1.0, 0.99), (4.0, 4.0)), (), "0.99 at 256 rows, 1.00 at 1024 rows of ours, not taken"),
        (timings((1.0, 0.5), (4.0, 2.0)), (0,), "0.50 at 256 rows, 0.50 at 1024 rows of ours, taken throughout"),
        (timings((1.0, 2.0), (4.0, 2.0)), (512,), "2.00 at 256 rows, 0.50 at 1024 rows of ours, taken from 512 rows"),
        (
            timings((1.0, 2.0), (4.0, 2.0), (16.0, 20.0), (64.0, 32.0)),
            (512, 2048, 8192),
            "2.00 at 256 rows, 0.50 at 1024 rows, 1.25 at 4096 rows, 0.50 at 16384 rows of ours, taken from 512 to "
            "2047 rows and from 8192 rows",
        ),
        ((), (), ""),
    ],
    ids=str,
)
def test_the_faster_product_is_taken_around_the_rows_that_were_timed(
    found: tuple[Fp8Timing, ...], switches: tuple[int, ...], said: str
) -> None:
    weight = matrices()[1]
    chosen, told = chosen_fp8(weight, found)
    assert chosen == replace(weight, switches=switches)
    assert told == (f"torch._scaled_mm measured {said}" if said else "")


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("is_static", [False, True])
def test_the_library_gives_what_the_reference_gives(has_bias: bool, is_static: bool, device: str) -> None:
    x, weight = matrices()
    if is_static:
        x = replace(x, scale=torch.full_like(x.scale, 0.02))
    bias = noise(48) if has_bias else None
    want = linear_fp8(x, weight, Epilogue(bias=bias), "reference")
    terms = x.values.float().abs() @ weight.values.float().abs().t() * x.scale[:, None] * weight.scale
    bound = FP8_TOLERANCE * terms + ROUNDING * (want.abs() + (0 if bias is None else bias.abs()))
    there = [Fp8Matrix(each.values.to(device), each.scale.to(device)) for each in (x, weight)]
    epilogue = Epilogue(BF16, None if bias is None else bias.to(device))
    got = linear_fp8_library(there[0], there[1], epilogue)
    assert got.dtype is BF16
    assert bool(((got.cpu().float() - want).abs() <= bound).all())
    tokens = Fp8Matrix(there[0].values.view(1, 37, 64), there[0].scale)
    assert torch.equal(linear_fp8_library(tokens, there[1], epilogue), got[None])


def test_rows_and_epilogue_say_which_product_runs(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    calls: list[int] = []

    def counted(x: Fp8Matrix, weight: Fp8Matrix, epilogue: Epilogue) -> Tensor:
        calls.append(len(x.values))
        return linear_fp8_library(x, weight, epilogue)

    monkeypatch.setattr(fp8, "linear_fp8_library", counted)
    x, weight = (Fp8Matrix(each.values.to(device), each.scale.to(device)) for each in matrices())
    weight = replace(weight, switches=(20, 30))
    plain = Epilogue(BF16)
    for rows in (19, 20, 29, 30):
        some = Fp8Matrix(x.values[:rows], x.scale[:rows])
        got = linear_fp8(some, weight, plain)
        want = linear_fp8(some, replace(weight, switches=()), plain)
        assert torch.allclose(got.float(), want.float(), rtol=2 * ROUNDING, atol=ROUNDING * float(want.abs().max()))
    assert calls == [20, 29]
    some = Fp8Matrix(x.values[:25], x.scale[:25])
    linear_fp8(some, weight, Epilogue(torch.float32))
    linear_fp8(some, weight, Epilogue(BF16, residual=torch.zeros(25, 48, dtype=BF16, device=device)))
    odd = quantize_fp8(noise(40, 64).to(device), "reference")
    linear_fp8(some, replace(odd, switches=(0,)), plain)
    assert calls == [20, 29], "float outputs, residuals and sizes that it does not take are ours"


def test_both_products_are_timed_and_a_library_without_one_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(call: Callable[[], Tensor]) -> float:
        return float(call().shape[0])

    weight = matrices()[1]
    assert fp8_timings(weight, BF16, (2, 3), seconds) == (Fp8Timing(2, 2.0, 2.0), Fp8Timing(3, 3.0, 3.0))

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such product")

    monkeypatch.setattr(torch, "_scaled_mm", refuse)
    assert fp8_timings(weight, BF16, (2, 3), seconds) == ()
    assert measured_fp8(weight, BF16, cache := Fp8Timings()) == (weight, ""), "nothing is timed on a CPU"
    assert not cache.known


@pytest.mark.gpu
def test_a_gpu_is_timed_once_for_a_shape() -> None:
    x, weight = matrices(512, 256, 512)
    there = Fp8Matrix(weight.values.cuda(), weight.scale.cuda())
    chosen, said = measured_fp8(there, BF16, cache := Fp8Timings())
    ((timing, *_),) = cache.known.values()
    assert timing.own > 0
    assert said.startswith("torch._scaled_mm measured ")
    assert measured_fp8(there, BF16, cache)[1] == said
    given = Fp8Matrix(x.values.cuda(), x.scale.cuda())
    want = linear_fp8(x, weight, Epilogue(), "reference")
    for switches in ((), (0,), chosen.switches):
        got = linear_fp8(given, replace(there, switches=switches), Epilogue(BF16)).float().cpu()
        assert torch.allclose(got, want, rtol=2 * ROUNDING, atol=ROUNDING * float(want.abs().max()))
    assert measured_fp8(there, torch.float32, cache) == (there, "")
    assert FP8 is there.values.dtype
