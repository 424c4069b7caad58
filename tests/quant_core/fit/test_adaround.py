from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quant_core.fit.adaround import SoftRounding, anneal
from quant_core.fit.layer_rounding import nearest_codes, weight_grid
from quant_core.nn.layers import QuantLayer, weight_matrix
from quant_core.nn.steps import StepClock
from quant_spec.formats import LayerSpec, WeightSpec
from quant_spec.ranges import RangeSpec

BITS = 3


def prepared(layer: nn.Module, method: str = "minmax", **weight: Any) -> tuple[QuantLayer, Tensor, Tensor]:
    """A layer at its nearest codes, its float weight, and the weight in steps of the grid (C_out, K)."""
    made = QuantLayer(layer, LayerSpec(WeightSpec(BITS, **weight)), StepClock(()))  # type: ignore[arg-type]
    original = layer.get_parameter("weight").detach().clone()
    matrix, groups = weight_matrix(original), made.group_index
    grid = weight_grid(matrix, made.spec, groups, RangeSpec(method))  # type: ignore[arg-type]
    made.set_codes(nearest_codes(matrix, grid, BITS, groups), grid.scale, grid.zero_point)
    return made, original, matrix / grid.scale[:, groups] + grid.zero_point[:, groups]


@pytest.fixture(params=["conv", "linear", "per_group"])
def layer(request: pytest.FixtureRequest) -> tuple[QuantLayer, Tensor, Tensor]:
    torch.manual_seed(0)
    if request.param == "conv":
        return prepared(nn.Conv2d(6, 8, 3))
    if request.param == "linear":
        return prepared(nn.Linear(40, 16), method="mse")
    return prepared(nn.Linear(40, 16), granularity="per_group", group_size=16)


def test_it_starts_at_the_weight(layer: tuple[QuantLayer, Tensor, Tensor]) -> None:
    made, original, position = layer
    soft = SoftRounding(made, original, trust=0.0)
    inside = (position > 0.02) & (position < 2**BITS - 1.02)
    gap = (weight_matrix(soft.weight().detach()) - weight_matrix(original)).abs()
    steps = made.scale.float()[:, made.group_index]
    # but for the 1 % that keeps the sigmoid's start finite
    assert float((gap / steps)[inside].max()) < 0.0101
    assert float((gap / steps)[inside].mean()) < 0.001


def test_the_two_codes_are_the_neighbours_of_the_weight(layer: tuple[QuantLayer, Tensor, Tensor]) -> None:
    made, original, position = layer
    soft = SoftRounding(made, original)
    inside = (position > 0) & (position < 2**BITS - 1)
    assert bool(((position - soft.lower)[inside] >= -1e-4).all())
    assert bool(((position - soft.lower)[inside] <= 1 + 1e-4).all())
    soft.alpha.data.fill_(-9.0)
    soft.commit()
    assert torch.equal(made.codes().float(), soft.lower.clamp(0, 2**BITS - 1))
    soft.alpha.data.fill_(9.0)
    soft.commit()
    assert torch.equal(made.codes().float(), (soft.lower + 1).clamp(0, 2**BITS - 1))


def test_committing_at_once_gives_the_start_back(layer: tuple[QuantLayer, Tensor, Tensor]) -> None:
    made, original, position = layer
    before = made.codes()
    SoftRounding(made, original).commit()
    tie = ((position - position.floor()) - 0.5).abs() < 1e-3
    assert torch.equal(made.codes()[~tie], before[~tie])


def test_what_is_committed_is_what_the_soft_weight_tends_to(layer: tuple[QuantLayer, Tensor, Tensor]) -> None:
    made, original, _ = layer
    soft = SoftRounding(made, original)
    soft.alpha.data = torch.where(
        torch.rand(soft.alpha.shape, generator=torch.Generator().manual_seed(1)) < 0.5, -9.0, 9.0
    )
    wanted = soft.weight().detach()
    soft.commit()
    torch.testing.assert_close(made.weight, wanted)


def test_trust_leans_to_the_code_that_the_layer_has() -> None:
    torch.manual_seed(0)
    made, original, _ = prepared(nn.Linear(40, 16))
    # A closed-form rounding: some codes are not the nearest, and some not even a neighbour.
    draw = torch.Generator().manual_seed(2)
    codes = (made.codes().long() + torch.randint(-1, 2, made.codes().shape, generator=draw)).clamp(0, 2**BITS - 1)
    made.set_codes(codes.to(torch.uint8), made.scale, made.zero_point)
    gaps = []
    for trust in (0.0, 0.5, 0.95):
        soft = SoftRounding(made, original, trust=trust)
        assert bool(((codes == soft.lower) | (codes == soft.lower + 1)).all())
        gaps.append(float((soft.lower + soft.soft().detach() - codes).abs().mean()))
    assert gaps[0] > 1.5 * gaps[1] > 1.5 * 1.5 * gaps[2]
    SoftRounding(made, original, trust=0.95).commit()
    assert torch.equal(made.codes().long(), codes)


def test_the_regulariser_is_zero_where_every_weight_has_chosen(layer: tuple[QuantLayer, Tensor, Tensor]) -> None:
    soft = SoftRounding(layer[0], layer[1])
    soft.alpha.data = torch.where(soft.alpha > 0, 9.0, -9.0)
    for beta in (20.0, 2.0):
        assert soft.regulariser(beta).item() == 0
    soft.alpha.data.zero_()
    assert soft.regulariser(2.0).item() == pytest.approx(soft.alpha.numel())
    # h = 0.75: 1 - 0.5^beta
    soft.alpha.data.fill_(float(torch.logit(torch.tensor((0.75 + 0.1) / 1.2))))
    assert soft.regulariser(3.0).item() == pytest.approx(soft.alpha.numel() * (1 - 0.5**3), rel=1e-4)


def test_the_regularisers_gradient_pushes_to_the_nearer_end(layer: tuple[QuantLayer, Tensor, Tensor]) -> None:
    soft = SoftRounding(layer[0], layer[1])
    h = soft.soft().detach()
    soft.regulariser(2.0).backward()
    clear = (h > 0.02) & (h < 0.98) & ((h - 0.5).abs() > 0.01)
    assert soft.alpha.grad is not None
    assert bool((torch.sign(soft.alpha.grad) == torch.where(h > 0.5, -1.0, 1.0))[clear].all())
    assert int(clear.sum()) > 100


def test_the_soft_weight_carries_gradients(layer: tuple[QuantLayer, Tensor, Tensor]) -> None:
    soft = SoftRounding(layer[0], layer[1])
    soft.weight().sum().backward()
    assert soft.alpha.grad is not None
    assert float((soft.alpha.grad > 0).float().mean()) > 0.8


def test_annealing() -> None:
    schedule = [anneal(i, 10, 0.25, (20.0, 2.0)) for i in range(10)]
    assert schedule[:3] == [None] * 3
    assert schedule[3] == 20
    assert schedule[-1] == 2
    steps = [a - b for a, b in itertools.pairwise(schedule[3:])]  # type: ignore[operator]
    assert steps == pytest.approx([3.0] * 6)
    assert anneal(0, 1, 0.0, (20.0, 2.0)) == 20
    assert anneal(9, 10, 1.0, (20.0, 2.0)) is None
