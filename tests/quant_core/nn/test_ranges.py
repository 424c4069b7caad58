from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.affine import fake_quantize_affine
from quant_core.nn.ranges import QParams, choose_qparams, qparams_from_range
from quant_spec.enums import RangeMethod
from quant_spec.errors import QuantizationError
from quant_spec.ranges import RangeSpec

MINMAX, MSE = RangeSpec(), RangeSpec(RangeMethod.MSE)


def quantized(rows: Tensor, grid: QParams, bits: int) -> Tensor:
    return fake_quantize_affine(rows, grid.scale[..., None], grid.zero_point[..., None], 0, 2**bits - 1)


@pytest.fixture
def rows() -> Tensor:
    """Heavy-tailed rows of different widths and offsets."""
    draw = torch.Generator().manual_seed(0)
    normal = torch.randn(12, 200, generator=draw)
    return normal**3 * torch.rand(12, 1, generator=draw) + torch.randn(12, 1, generator=draw)


def test_affine_range_of_hand() -> None:
    grid = qparams_from_range(torch.tensor([-1.0, 0.5, -3.0]), torch.tensor([2.0, 3.0, -1.0]), 2, symmetric=False)
    assert grid.scale.tolist() == [1.0, 1.0, 1.0]  # zero is in every range: [-1, 2], [0, 3], [-3, 0]
    assert grid.zero_point.tolist() == [1.0, 0.0, 3.0]


def test_symmetric_range_of_hand() -> None:
    grid = qparams_from_range(torch.tensor([-7.0, -1.0]), torch.tensor([3.5, 14.0]), 4, symmetric=True)
    assert grid.scale.tolist() == [1.0, 2.0]
    assert grid.zero_point.tolist() == [8.0, 8.0]


@pytest.mark.parametrize("method", list(RangeMethod))
@pytest.mark.parametrize("symmetric", [False, True])
def test_zero_constant_and_one_sided_rows(method: RangeMethod, symmetric: bool) -> None:
    rows = torch.stack([torch.zeros(9), torch.full((9,), 3.0), torch.linspace(1, 2, 9), torch.linspace(-2, -1, 9)])
    grid = choose_qparams(rows, 8, symmetric=symmetric, spec=RangeSpec(method))
    assert bool((grid.scale > 0).all())
    assert bool(((grid.zero_point >= 0) & (grid.zero_point <= 255)).all())
    assert torch.equal(grid.zero_point, grid.zero_point.round())
    got = quantized(rows, grid, 8)
    assert torch.equal(got[0], torch.zeros(9))
    torch.testing.assert_close(got[1:], rows[1:], rtol=0, atol=0.02)


def test_min_max_loses_half_a_step_at_most(rows: Tensor) -> None:
    for bits in (2, 4, 8):
        grid = choose_qparams(rows, bits, symmetric=False, spec=MINMAX)
        # the zero point is rounded too, which moves the ends by as much again
        assert bool(((quantized(rows, grid, bits) - rows).abs() <= 1.01 * grid.scale[:, None]).all())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [3, 4])
def test_the_search_beats_min_max(rows: Tensor, bits: int, symmetric: bool) -> None:
    def errors(values: Tensor, spec: RangeSpec) -> Tensor:
        grid = choose_qparams(values, bits, symmetric=symmetric, spec=spec)
        return (quantized(values, grid, bits) - values).abs().pow(2.4).mean(1)

    assert bool((errors(rows, MSE) <= errors(rows, MINMAX)).all())
    normal = torch.randn(4, 4000, generator=torch.Generator().manual_seed(1))
    assert float(errors(normal, MSE).sum()) < 0.7 * float(errors(normal, MINMAX).sum())


def one_row(row: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """BRECQ's loop, for one row."""
    best = torch.inf
    for i in range(80):
        low, high = row.min() * (1 - 0.01 * i), row.max() * (1 - 0.01 * i)
        if symmetric:
            scale = torch.maximum(-low, high).clamp(min=0) / (2 ** (bits - 1) - 1)
            zero = torch.tensor(2.0 ** (bits - 1))
        else:
            low, high = low.clamp(max=0), high.clamp(min=0)
            scale = (high - low) / (2**bits - 1)
            zero = torch.round(-low / scale)
        back = ((torch.round(row / scale) + zero).clamp(0, 2**bits - 1) - zero) * scale
        score = float(((row - back).abs() ** 2.4).mean())
        if score < best:
            best, found = score, (scale, zero)
    return found


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_search_over_all_rows_equals_a_loop_over_each(rows: Tensor, symmetric: bool) -> None:
    grid = choose_qparams(rows, 4, symmetric=symmetric, spec=MSE)
    for row, scale, zero in zip(rows, grid.scale, grid.zero_point, strict=True):
        assert (scale, zero) == one_row(row, 4, symmetric)


def test_percentile_cuts_both_tails() -> None:
    row = torch.arange(1001.0)[torch.randperm(1001, generator=torch.Generator().manual_seed(0))] - 500
    grid = choose_qparams(row[None], 8, symmetric=False, spec=RangeSpec(RangeMethod.PERCENTILE, 0.9))
    # 5 % to each side: -450 to 450
    assert grid.scale.item() == pytest.approx(900 / 255)
    whole = choose_qparams(row[None], 8, symmetric=False, spec=RangeSpec(RangeMethod.PERCENTILE, 1.0))
    assert whole.scale.item() == pytest.approx(1000 / 255)


@pytest.mark.parametrize("percentile", [0.5, 0.0, 1.01])
def test_percentiles_that_make_no_sense_are_refused(percentile: float) -> None:
    with pytest.raises(QuantizationError, match=f"got {percentile}, wanted more than 0.5 and at most 1"):
        RangeSpec(RangeMethod.PERCENTILE, percentile)


def test_rows_may_have_any_leading_shape(rows: Tensor) -> None:
    for spec in (MINMAX, MSE, RangeSpec(RangeMethod.PERCENTILE, 0.99)):
        flat = choose_qparams(rows, 4, symmetric=False, spec=spec)
        deep = choose_qparams(rows.reshape(3, 4, 200), 4, symmetric=False, spec=spec)
        alone = choose_qparams(rows[0], 4, symmetric=False, spec=spec)
        assert torch.equal(deep.scale.flatten(), flat.scale)
        assert torch.equal(deep.zero_point.flatten(), flat.zero_point)
        assert (alone.scale, alone.zero_point) == (flat.scale[0], flat.zero_point[0])
