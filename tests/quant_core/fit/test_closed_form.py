from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quant_core.fit.closed_form import damped, factorize, round_closed_form
from quant_core.fit.layer_rounding import nearest_codes, weight_grid
from quant_core.nn.layers import weight_groups
from quant_core.nn.ranges import QParams
from quant_spec.enums import Granularity
from quant_spec.formats import LayerSpec, WeightSpec
from quant_spec.ranges import RangeSpec

COLUMNS = 200  # more than one block


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def hessian() -> Tensor:
    """Of inputs that a few directions explain, as features of a network's layers are."""
    x = random(2000, 20, seed=1) @ random(20, COLUMNS, seed=2) + 0.3 * random(2000, COLUMNS, seed=3)
    return x.T @ x / len(x)


def setup(bits: int = 4, **weight: object) -> tuple[Tensor, QParams, Tensor]:
    spec = LayerSpec(WeightSpec(bits, **weight))  # type: ignore[arg-type]
    matrix, groups = random(16, COLUMNS), weight_groups((16, COLUMNS), spec)
    return matrix, weight_grid(matrix, spec, groups, RangeSpec()), groups


def output_error(matrix: Tensor, codes: Tensor, grid: QParams, groups: Tensor, hessian: Tensor) -> float:
    error = matrix - (codes.float() - grid.zero_point[:, groups]) * grid.scale[:, groups]
    return float(((error @ hessian) * error).sum())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("weight", [{}, {"granularity": "per_group", "group_size": 32}, {"granularity": "per_tensor"}])
def test_it_beats_nearest_at_the_output(hessian: Tensor, bits: int, weight: dict[str, object]) -> None:
    matrix, grid, groups = setup(bits, **weight)
    nearest = nearest_codes(matrix, grid, bits, groups)
    codes = round_closed_form(matrix, factorize(hessian, 0.01), grid, bits, groups)
    assert codes.dtype is torch.uint8
    assert int(codes.max()) <= 2**bits - 1
    errors = [output_error(matrix, c, grid, groups, hessian) for c in (nearest, codes)]
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("granularity", [Granularity.PER_CHANNEL, Granularity.PER_TENSOR])
def test_with_inputs_that_are_uncorrelated_it_is_nearest(granularity: Granularity) -> None:
    matrix, grid, groups = setup(4, granularity=granularity)
    for hessian in (torch.eye(COLUMNS), torch.diag(torch.linspace(1, 9, COLUMNS))):
        codes = round_closed_form(matrix, factorize(hessian, 0.0), grid, 4, groups)
        assert torch.equal(codes, nearest_codes(matrix, grid, 4, groups))


def test_one_column_after_the_other_of_hand() -> None:
    # Two inputs that are nearly the same: what rounding the first loses, the second makes good.
    hessian = torch.tensor([[1.0, 0.99], [0.99, 0.98011]])
    matrix, grid = torch.tensor([[0.4, 0.4]]), QParams(torch.ones(1, 1), torch.full((1, 1), 2.0))
    groups = torch.zeros(2, dtype=torch.long)
    assert nearest_codes(matrix, grid, 2, groups).tolist() == [[2, 2]]
    assert round_closed_form(matrix, factorize(hessian, 0.0), grid, 2, groups).tolist() == [[2, 3]]


def test_columns_that_are_never_active_are_rounded_to_nearest(hessian: Tensor) -> None:
    matrix, grid, groups = setup()
    silent = torch.arange(COLUMNS) % 5 == 0
    hessian[silent] = 0
    hessian[:, silent] = 0
    codes = round_closed_form(matrix, factorize(hessian, 0.01), grid, 4, groups)
    nearest = nearest_codes(matrix, grid, 4, groups)
    assert torch.equal(codes[:, silent], nearest[:, silent])
    assert output_error(matrix, codes, grid, groups, hessian) < 0.5 * output_error(
        matrix, nearest, grid, groups, hessian
    )
    none = round_closed_form(matrix, factorize(torch.zeros(COLUMNS, COLUMNS), 0.01), grid, 4, groups)
    assert torch.equal(none, nearest)


def test_fewer_samples_than_columns_are_enough() -> None:
    x = random(40, COLUMNS, seed=4)
    matrix, grid, groups = setup()
    codes = round_closed_form(matrix, factorize(x.T @ x / 40, 0.01), grid, 4, groups)
    nearest = nearest_codes(matrix, grid, 4, groups)
    errors = [output_error(matrix, c, grid, groups, x.T @ x / 40) for c in (nearest, codes)]
    assert errors[1] < 0.5 * errors[0]


def test_damping_adds_a_share_of_the_mean_diagonal() -> None:
    hessian = torch.tensor([[4.0, 1.0, 0.0], [1.0, 2.0, 0.0], [0.0, 0.0, 0.0]])
    assert damped(hessian, 0.5).tolist() == [[5.0, 1.0, 0.0], [1.0, 3.0, 0.0], [0.0, 0.0, 2.0]]
