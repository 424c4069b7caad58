from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from quant_core.fit.closed_form import factorize, round_closed_form
from quant_core.fit.group_scales import most_multiplied
from quant_core.fit.layer_rounding import nearest_codes, weight_grid
from quant_core.nn.layers import group_parts, weight_groups
from quant_core.nn.ranges import QParams
from quant_spec.enums import Granularity, RangeMethod
from quant_spec.formats import GREATEST_MULTIPLIER, LayerSpec, WeightSpec
from quant_spec.ranges import RangeSpec
from tests.quant_core.multiplied import multiplied

MSE = RangeSpec(method=RangeMethod.MSE)
SHAPE = (24, 100, 3)  # groups of 32, 32, 32 and 4 channels at each of three taps


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def uneven(split: tuple[int, ...] | None = None) -> Tensor:
    """A weight matrix whose groups differ in size up to sixfold, those of a split's second part another 40-fold."""
    groups = weight_groups(SHAPE, LayerSpec(multiplied(), split=split))
    matrix = random(SHAPE[0], len(groups)) * torch.exp(0.5 * random(SHAPE[0], int(groups.max()) + 1, seed=1))[:, groups]
    if split is not None:
        matrix[:, torch.arange(len(groups)) % SHAPE[1] >= split[0]] *= 40
    return matrix


def grid_of(matrix: Tensor, spec: WeightSpec, ranges: RangeSpec, split: tuple[int, ...] | None = None) -> QParams:
    layer = LayerSpec(spec, split=split)
    return weight_grid(matrix, layer, weight_groups(SHAPE, layer), ranges)


def quality(matrix: Tensor, grid: QParams, bits: int, groups: Tensor) -> float:
    """Signal over the error of nearest codes, in dB."""
    back = (nearest_codes(matrix, grid, bits, groups).float() - grid.zero_point[:, groups]) * grid.scale[:, groups]
    return float(10 * torch.log10(matrix.square().sum() / (matrix - back).square().sum()))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("split", [None, (40, 60)])
@pytest.mark.parametrize(
    "ranges", [MSE, RangeSpec(), RangeSpec(method=RangeMethod.PERCENTILE, percentile=0.9)], ids=str
)
def test_products_are_int8_and_scales_are_exact(bits: int, split: tuple[int, ...] | None, ranges: RangeSpec) -> None:
    grid = grid_of(uneven(split), multiplied(bits), ranges, split)
    assert grid.multiplier is not None
    zero, multiplier = grid.zero_point, grid.multiplier
    assert torch.equal(multiplier, multiplier.round())
    assert 1 <= int(multiplier.min()) <= int(multiplier.max()) <= GREATEST_MULTIPLIER
    assert int((-zero * multiplier).min()) >= -128
    assert int(((2**bits - 1 - zero) * multiplier).max()) <= 127
    channel = grid.scale / multiplier
    for part in range(len(split or (0,))):
        own = channel[:, group_parts(grid.scale.shape[1], LayerSpec(multiplied(), split=split)) == part]
        assert bool((own == own[:, :1]).all()), "one scale of a channel and part"
    assert torch.equal((channel.double() * multiplier.double()).float(), grid.scale)
    assert bool((grid.scale.double() == channel.double() * multiplier.double()).all()), "no rounding"


def test_the_greatest_multipliers() -> None:
    assert most_multiplied(torch.tensor([0.0, 7.0, 8.0, 15.0]), 4).tolist() == [8, 15, 16, 8]
    assert most_multiplied(torch.tensor([16.0, 32.0]), 5).tolist() == [8, 4]
    assert most_multiplied(torch.tensor([32.0, 31.0]), 6).tolist() == [4, 3]


@pytest.mark.parametrize(("bits", "loss"), [(4, 0.1), (3, 0.1), (6, 2.0)])
@pytest.mark.parametrize("split", [None, (40, 60)])
def test_integers_cost_next_to_nothing(bits: int, loss: float, split: tuple[int, ...] | None) -> None:
    """Beside floats of the same groups; of 6 bits more, as multipliers end at 4. One scale a channel is worse."""
    matrix, groups = uneven(split), weight_groups(SHAPE, LayerSpec(multiplied(), split=split))
    floats = grid_of(matrix, WeightSpec(bits, granularity=Granularity.PER_GROUP, group_size=32), MSE, split)
    channels = grid_of(matrix, WeightSpec(bits), MSE, split)
    got = quality(matrix, grid_of(matrix, multiplied(bits), MSE, split), bits, groups)
    assert got > quality(matrix, floats, bits, groups) - loss
    columns = weight_groups(SHAPE, LayerSpec(WeightSpec(bits), split=split))
    assert got > quality(matrix, channels, bits, columns) + (0.5 if bits == 6 else 1.5)


def test_a_range_that_is_not_searched_is_not_clipped() -> None:
    matrix, groups = uneven(), weight_groups(SHAPE, LayerSpec(multiplied()))
    grid = grid_of(matrix, multiplied(), RangeSpec())
    off = (matrix / grid.scale[:, groups]).round() + grid.zero_point[:, groups]
    assert float(off.min()) >= -1
    assert float(off.max()) <= 16
    wide = grid_of(matrix, WeightSpec(4, granularity=Granularity.PER_GROUP, group_size=32), RangeSpec())
    assert bool((grid.scale >= 0.99 * wide.scale).all())


def test_closed_form_makes_up_across_groups() -> None:
    matrix, groups = uneven(), weight_groups(SHAPE, LayerSpec(multiplied()))
    inputs = random(1000, 30, seed=2) @ random(30, len(groups), seed=3) + 0.3 * random(1000, len(groups), seed=4)
    moment = inputs.T @ inputs / len(inputs)
    grid = grid_of(matrix, multiplied(), MSE)
    errors = []
    for codes in (
        nearest_codes(matrix, grid, 4, groups),
        round_closed_form(matrix, factorize(moment, 0.01), grid, 4, groups),
    ):
        error = matrix - (codes.float() - grid.zero_point[:, groups]) * grid.scale[:, groups]
        errors.append(float(((error @ moment) * error).sum()))
    assert errors[1] < 0.5 * errors[0]


def test_rows_and_groups_of_zeros_stay_finite() -> None:
    matrix = uneven()
    matrix[3] = 0
    matrix[5, :40] = 0
    grid = grid_of(matrix, multiplied(), MSE)
    assert bool((grid.scale > 0).all())
    assert math.isfinite(quality(matrix, grid, 4, weight_groups(SHAPE, LayerSpec(multiplied()))))
