from __future__ import annotations

import mmap

import pytest
import torch
from torch import Tensor

from kernels.activations import ActivationTable, QuantizedActivation, minmax_grid, quantize_by_table, quantize_dynamic
from kernels.affine import quantize_affine
from kernels.errors import KernelError

STEPS = ActivationTable(torch.tensor([0.02, 0.5, 0.07]), torch.tensor([0.0, 128.0, 255.0]), 8)
ONE = ActivationTable(torch.tensor([0.25]), torch.tensor([3.0]), 4)


def moved(table: ActivationTable, device: str) -> ActivationTable:
    divisor = None if table.divisor is None else table.divisor.to(device)
    return ActivationTable(table.scale.to(device), table.zero_point.to(device), table.bits, table.symmetric, divisor)


def same(got: QuantizedActivation, want: QuantizedActivation) -> None:
    for name in ("codes", "scale", "zero_point"):
        left, right = getattr(got, name).cpu(), getattr(want, name).cpu()
        assert left.dtype == right.dtype, name
        assert torch.equal(left, right), name


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * 4


def test_codes_are_those_of_the_definition() -> None:
    x = noise(3, 5, 7)
    got = quantize_by_table(x, STEPS, torch.tensor([2, 0, 1]))
    for row, step in enumerate((2, 0, 1)):
        want = quantize_affine(x[row], STEPS.scale[step], STEPS.zero_point[step], 0, 255)
        assert torch.equal(got.codes[row].int() + 128, want.int())
    assert got.scale.tolist() == STEPS.scale[[2, 0, 1]].tolist()
    assert got.zero_point.tolist() == [127, -128, 0]


def test_ties_round_to_even_and_infinities_saturate(device: str) -> None:
    x = torch.tensor([[-0.75, 0.125, 0.375, 0.625, -0.125, 3e37, float("inf"), -float("inf")]], device=device)
    for backend in ("reference", "triton"):
        got = quantize_by_table(x, moved(ONE, device), backend=backend)
        # x / 0.25 = -3, 0.5, 1.5, 2.5, -0.5, ...; plus the zero point 3, minus 8
        assert got.codes.tolist() == [[-8, -5, -3, -3, -5, 7, 7, -8]]


@pytest.mark.parametrize("shape", [(1, 1), (3, 63), (2, 5, 1000), (3, 4, 5, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_by_table_equals_its_twin(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    x = noise(*shape).to(device, dtype)
    index = torch.arange(shape[0], device=device) % 3
    for table, steps in ((STEPS, index), (STEPS, index[0]), (ONE, None)):
        table = moved(table, device)
        same(quantize_by_table(x, table, steps, "triton"), quantize_by_table(x, table, steps, "reference"))


def test_channels_have_divisors_of_their_own_and_infinity_leaves_one_out(device: str) -> None:
    x, index = noise(4, 3, 600), torch.tensor([1, 0, 1, 1])
    divisor = torch.rand(2, 600, generator=torch.Generator().manual_seed(0)) + 0.01
    divisor[0, 5], divisor[1, 530:] = torch.inf, torch.inf
    table = ActivationTable(torch.tensor([0.05, 0.2]), torch.tensor([7.0, 130.0]), 8, divisor=divisor)
    for backend in ("reference", "triton"):
        got = quantize_by_table(x.to(device), moved(table, device), index.to(device), backend=backend)
        codes = got.codes.cpu().int() + 128
        for row, step in enumerate(index):
            left_out = divisor[step].isinf()
            want = quantize_affine(x[row], divisor[step].nan_to_num(posinf=1e38), table.zero_point[step], 0, 255)
            assert torch.equal(codes[row], want.int())
            assert bool((codes[row, :, left_out] == table.zero_point[step]).all())
        assert torch.equal(got.scale.cpu(), table.scale[index])


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("shape", [(3, 63), (2, 3, 700)])
def test_dynamic_ranges_of_scaled_channels_are_those_of_the_divided_input(
    shape: tuple[int, ...], per_token: bool, device: str
) -> None:
    x, channels = noise(*shape), shape[-1]
    factor = 2.0 ** (torch.arange(channels) % 7 - 3)  # powers of two, so that dividing twice rounds like once
    want = quantize_dynamic(x / factor, 8, symmetric=False, per_token=per_token, backend="reference")
    for factors in (factor, factor * 1.1):
        twins = [
            quantize_dynamic(
                x.to(device), 8, symmetric=False, per_token=per_token, channel_scale=factors.to(device), backend=backend
            )
            for backend in ("triton", "reference")
        ]
        same(*twins)
        if factors is factor:
            same(twins[0], want)


@pytest.mark.parametrize("shape", [(1, 1), (3, 63), (2, 3, 2100), (2, 2, 3, 17)])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("per_token", [True, False])
def test_dynamic_equals_its_twin(shape: tuple[int, ...], symmetric: bool, per_token: bool, device: str) -> None:
    x = noise(*shape).to(device)
    x[0] = x[0].abs()  # zero belongs to each range
    for bits in (8, 4):
        twins = [
            quantize_dynamic(x, bits, symmetric=symmetric, per_token=per_token, backend=backend)
            for backend in ("triton", "reference")
        ]
        same(*twins)
    assert len(twins[0].scale) == (x.numel() // x.shape[-1] if per_token else x.shape[0])
    assert not symmetric or bool((twins[0].zero_point == 0).all())


def test_dynamic_ranges_are_minima_and_maxima() -> None:
    x = torch.tensor([[0.0, 2.55], [-1.0, 1.55], [0.0, 0.0]])
    got = quantize_dynamic(x, 8, symmetric=False, per_token=True, backend="reference")
    assert torch.allclose(got.scale, torch.tensor([0.01, 0.01, 1e-8]))
    assert got.codes.tolist() == [[-128, 127], [-128, 127], [-128, -128]]
    scale, zero = minmax_grid(torch.tensor(-1.0), torch.tensor(0.5), 4, symmetric=True)
    assert (scale.item(), zero.item()) == (pytest.approx(1 / 7), 8)


def test_strides_do_not_matter(device: str) -> None:
    base = noise(6, 50).to(device)
    table = moved(STEPS, device)
    for x in (base.t(), base[:, ::3], base[1:, 3:], base.view(2, 3, 50).transpose(0, 1)):
        index = torch.zeros((), dtype=torch.long, device=device)
        want = quantize_by_table(x.clone(memory_format=torch.contiguous_format), table, index, "reference")
        same(quantize_by_table(x, table, index, "triton"), want)
        for per_token in (True, False):
            twins = [
                quantize_dynamic(x, 8, symmetric=False, per_token=per_token, backend=backend)
                for backend in ("triton", "reference")
            ]
            same(*twins)


def test_rows_may_lie_beyond_32_bit_offsets() -> None:
    if torch.cuda.is_available():
        pytest.skip("the sparse mapping is host memory")
    far = torch.frombuffer(mmap.mmap(-1, 3 * 2**30 + 64), dtype=torch.float16)
    x = far.as_strided((4, 8), (2**29 - 8, 1))
    x.copy_(noise(4, 8))
    wide = torch.frombuffer(mmap.mmap(-1, 3 * 2**30 + 64), dtype=torch.int8).as_strided((4, 8), (2**30, 1))
    wide.copy_(noise(4, 8))
    index = torch.tensor(1)
    same(quantize_by_table(x, STEPS, index, "triton"), quantize_by_table(x.clone(), STEPS, index, "reference"))
    same(
        quantize_by_table(wide, STEPS, index, "triton"),
        quantize_by_table(wide.contiguous(), STEPS, index, "reference"),
    )


def test_quotients_are_true_divisions(device: str) -> None:
    # Between two codes the reciprocal rounds to the other side for some of these.
    steps = torch.tensor([0.1, 0.03, 0.007, 1 / 3])
    x = (torch.arange(-120, 120) + 0.5) * steps[:, None]
    assert not torch.equal((x / steps[:, None]).round(), (x * (1 / steps[:, None])).round())
    table = ActivationTable(steps.to(device), torch.full((4,), 128.0, device=device), 8)
    want = quantize_affine(x, steps[:, None], torch.tensor(128), 0, 255)
    for backend in ("reference", "triton"):
        got = quantize_by_table(x.to(device), table, torch.arange(4, device=device), backend)
        assert torch.equal(got.codes.cpu().int() + 128, want.int()), backend


def test_one_step_for_a_whole_batch(device: str) -> None:
    x, index = noise(4, 6).to(device), torch.tensor([2], device=device).expand(4)
    twins = [quantize_by_table(x, moved(STEPS, device), index, backend) for backend in ("triton", "reference")]
    same(*twins)
    assert twins[0].scale.tolist() == [STEPS.scale[2].item()] * 4


def test_bad_tables_are_refused() -> None:
    x = torch.zeros(4, 8)
    with pytest.raises(KernelError, match=r"got .* no index, wanted"):
        quantize_by_table(x, STEPS)
    with pytest.raises(KernelError, match="activation rows: got 4, wanted a multiple of 3 samples"):
        quantize_by_table(x, STEPS, torch.tensor([0, 1, 2]))
    with pytest.raises(KernelError, match="activation bits: got 9"):
        quantize_dynamic(x, 9, symmetric=True, per_token=True)
    with pytest.raises(KernelError, match="got an empty tensor"):
        quantize_dynamic(x[:0], 8, symmetric=True, per_token=True)
    table = ActivationTable(torch.ones(1), torch.zeros(1), 8, divisor=torch.ones(1, 3))
    with pytest.raises(KernelError, match=r"divisor: got shape \(1, 3\), wanted \(1, 8\)"):
        quantize_by_table(x, table)
    with pytest.raises(KernelError, match=r"channel_scale: got shape \(3,\), wanted \(8,\)"):
        quantize_dynamic(x, 8, symmetric=True, per_token=True, channel_scale=torch.ones(3))


# The interpreter is numpy, which warns of what a GPU does silently.
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("odd", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_not_finite_shows_in_the_scale(odd: float, per_token: bool, symmetric: bool, device: str) -> None:
    x = torch.ones(3, 2, 2100, device=device)
    x[1, 1, 2050] = odd
    for backend in ("reference", "triton"):
        got = quantize_dynamic(x, 8, symmetric=symmetric, per_token=per_token, backend=backend)
        wanted = [True] * 3 + [False] + [True] * 2 if per_token else [True, False, True]
        assert got.scale.isfinite().tolist() == wanted, backend


def test_factors_of_channels_may_be_strided(device: str) -> None:
    x, factor = noise(3, 4, 30).to(device), (torch.rand(60, generator=torch.Generator().manual_seed(0)) + 0.1)[::2]
    for per_token in (True, False):
        got, want = (
            quantize_dynamic(
                x, 8, symmetric=False, per_token=per_token, channel_scale=factor.to(device), backend=backend
            )
            for backend in ("triton", "reference")
        )
        same(got, want)
