from __future__ import annotations

import pytest
import torch
from torch import nn

from quant_core.fit.hessian import InputMoments
from quant_core.fit.layer_rounding import round_layer
from quant_core.methods.mpqdm.low_rank import LowRankWeight
from quant_core.nn.layers import QuantLayer
from quant_core.nn.steps import StepClock
from quant_spec.formats import LayerSpec, WeightSpec
from quant_spec.ranges import RangeSpec

MIXED = WeightSpec(3, mixture=((1, 2), (2, 3), (3, 1)))


def tuned(layer: nn.Linear | nn.Conv2d, spec: LayerSpec, rank: int = 2) -> tuple[LowRankWeight, torch.Tensor]:
    """Round a layer in closed form, so that its codes are not the nearest, and make its tuned weight."""
    made = QuantLayer(layer, spec, StepClock(()))
    weight = layer.weight.detach()
    if spec.weight.mixture:
        made.set_channel_bits(torch.tensor([2, 1, 3, 2, 1, 2], dtype=torch.uint8))
    rows = torch.randn(200, made.columns, generator=torch.Generator().manual_seed(1)).cumsum(dim=1)
    round_layer(made, weight, InputMoments(rows.T @ rows / 200), RangeSpec("mse"), 0.03)
    return LowRankWeight(made, weight, rank, torch.Generator().manual_seed(2)), weight


@pytest.fixture(params=["linear", "conv", "split", "mixed"])
def case(request: pytest.FixtureRequest) -> tuple[LowRankWeight, torch.Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if request.param == "linear":
            return tuned(nn.Linear(10, 6), LayerSpec(WeightSpec(3)))
        conv = nn.Conv2d(5, 6, 3)
    if request.param == "conv":
        return tuned(conv, LayerSpec(WeightSpec(3, symmetric=True)))
    if request.param == "split":
        return tuned(conv, LayerSpec(WeightSpec(3), split=(2, 3)))
    return tuned(conv, LayerSpec(MIXED))


def test_it_starts_at_the_layers_codes_and_near_its_weight(case: tuple[LowRankWeight, torch.Tensor]) -> None:
    made, weight = case
    assert torch.equal(made.weight(), made.layer.weight)
    assert not torch.equal(made.base, weight.flatten(1)), "the codes are not all the nearest"


def test_what_is_committed_is_what_was_tuned(case: tuple[LowRankWeight, torch.Tensor]) -> None:
    made, _ = case
    optimizer = torch.optim.Adam(list(made.parameters().values()), lr=0.02)
    before = made.layer.codes().clone()
    for seed in range(8):
        target = torch.randn(made.layer.shape, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        (made.weight() * target).sum().backward()
        optimizer.step()
    wanted = made.weight().detach()
    made.commit()
    assert torch.equal(made.layer.weight, wanted)
    assert not torch.equal(made.layer.codes(), before)


def test_everything_that_is_learned_has_a_gradient(case: tuple[LowRankWeight, torch.Tensor]) -> None:
    made, _ = case
    with torch.no_grad():
        made.b.normal_(0, 0.05, generator=torch.Generator().manual_seed(3))
    target = torch.randn(made.layer.shape, generator=torch.Generator().manual_seed(4))
    (made.weight() - target).square().sum().backward()
    for name, parameter in made.parameters().items():
        if name != "bias":
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name
    assert ("zero_point" in made.parameters()) != made.layer.spec.weight.symmetric


def test_the_update_of_each_tap_has_the_rank() -> None:
    made, _ = tuned(nn.Conv2d(5, 6, 3), LayerSpec(WeightSpec(3)), rank=2)
    with torch.no_grad():
        made.b.normal_(generator=torch.Generator().manual_seed(3))
    update = (made.merged() - made.base).detach().view(6, 9, 5)
    assert [int(torch.linalg.matrix_rank(update[:, tap])) for tap in range(9)] == [2] * 9
