from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from scipy.stats import kurtosis as scipy_kurtosis
from torch import Tensor

from quant_core.methods.mpqdm.allocation import (
    Split,
    allocate,
    channel_bits,
    choose_in_layer,
    choose_over_layers,
    output_error,
)
from quant_core.methods.mpqdm.layer_errors import LayerErrors, kurtosis
from quant_spec.enums import AllocationMethod
from quant_spec.passes.allocate import AllocateChoice


def layer(channels: int, seed: int, *, bits: int = 4, columns: int = 10, effect: float = 1.0) -> LayerErrors:
    """Channels whose error falls fourfold with each bit, from what their kurtosis says."""
    tails = 3 + 5 * torch.rand(channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return LayerErrors(bits, columns, tails, (tails**4)[:, None] * torch.tensor([4.0, 1.0, 0.25]), effect)


def test_kurtosis_is_not_excess_and_has_the_unbiased_variance() -> None:
    rows = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)) ** 3
    expected = scipy_kurtosis(rows.double().numpy(), axis=1, fisher=False) * (39 / 40) ** 2
    assert kurtosis(rows).tolist() == pytest.approx(expected.tolist())


def test_channels_of_one_value_have_no_tails() -> None:
    assert kurtosis(torch.tensor([[0.0, 0.0, 0.0], [0.3, 0.3, 0.3], [1e-20, 2e-20, 4e-20]])).tolist() == pytest.approx(
        [0.0, 0.0, float(kurtosis(torch.tensor([[1.0, 2.0, 4.0]])))]
    )
    assert kurtosis(torch.tensor([[1.0], [2.0]])).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("extra", [0.0, 0.1])
def test_over_layers_all_bits_are_spent(extra: float) -> None:
    """Layers whose tenths do not add up to the budget: single channels take what the knapsack leaves."""
    layers = [
        layer(n, n, columns=c, effect=e) for n, c, e in ((37, 101, 1.0), (53, 67, 0.01), (64, 90, 9.0), (9, 7, 0.1))
    ]
    found = choose_over_layers(layers, AllocateChoice(method=AllocationMethod.GLOBAL, extra=extra))
    spent = sum(int((channel_bits(a, s).long() - 4).sum()) * a.columns for a, s in zip(layers, found, strict=True))
    left = int(extra * sum(a.channels * a.columns for a in layers)) - spent
    assert left >= 0
    assert all(s == Split(a.channels, 0) or a.columns > left for a, s in zip(layers, found, strict=True))


def test_heavy_tails_get_more_and_light_ones_less() -> None:
    tails = torch.tensor([3.0, 9.0, 5.0, 1.0, 7.0], dtype=torch.float64)
    made = LayerErrors(3, 8, tails, torch.zeros(5, 3, dtype=torch.float64), 1.0)
    assert channel_bits(made, Split(2, 1)).tolist() == [3, 4, 3, 2, 4]
    assert channel_bits(made, Split(0, 0)).tolist() == [3] * 5


def test_the_error_of_a_split_is_that_of_its_channels() -> None:
    made = layer(20, 0)
    bits = channel_bits(made, Split(5, 3)).tolist()
    expected = sum(float(made.errors[channel, width - 3]) for channel, width in enumerate(bits))
    assert output_error(made, Split(5, 3)) == pytest.approx(expected)


def test_in_a_layer_all_candidates_are_swept_and_the_mean_is_exact() -> None:
    config = AllocateChoice(method=AllocationMethod.KURTOSIS)
    made = layer(40, 1)
    found = choose_in_layer(made, config)
    errors = {m: output_error(made, Split(m, m)) for m in (0, 4, 8, 12, 16, 20)}
    assert found == Split(best := min(errors, key=errors.__getitem__), best)
    assert best > 4, "not only none and a tenth"
    assert int(channel_bits(made, found).sum()) == 4 * 40
    flat = LayerErrors(4, 8, made.kurtosis, torch.ones(40, 3, dtype=torch.float64) * torch.tensor([9.0, 1.0, 0.9]), 1.0)
    assert choose_in_layer(flat, config) == Split(0, 0)


@pytest.mark.parametrize("channels", [1, 3, 10, 47, 128])
def test_plus_promotes_a_tenth_more(channels: int) -> None:
    made = layer(channels, 2)
    bits = allocate({"a": made}, AllocateChoice(method=AllocationMethod.KURTOSIS, extra=0.1))["a"]
    assert int(bits.sum()) == 4 * channels + channels // 10
    assert set(bits.tolist()) <= {3, 4, 5}


def test_over_layers_bits_go_where_they_matter_within_the_same_sum() -> None:
    layers = {"little": layer(40, 3, columns=30, effect=0.01), "much": layer(40, 4, columns=20, effect=100.0)}
    alone = allocate(layers, AllocateChoice(method=AllocationMethod.KURTOSIS))
    together = allocate(layers, AllocateChoice(method=AllocationMethod.GLOBAL))

    def bits(found: dict[str, Tensor]) -> float:
        return sum(float(found[name].sum()) * made.columns for name, made in layers.items())

    def cost(found: dict[str, Tensor]) -> float:
        pairs = ((made, (found[name].long() - 3)[:, None]) for name, made in layers.items())
        return sum(made.effect * float(made.errors.gather(1, place).sum()) for made, place in pairs)

    assert bits(alone) == 4 * 40 * 50
    assert bits(alone) - 30 < bits(together) <= bits(alone)
    assert cost(together) < 0.8 * cost(alone)
    assert together["much"].float().mean() > 4 > together["little"].float().mean()


def test_over_layers_is_the_best_of_all_pairs() -> None:
    layers = [layer(10, 5, columns=6), layer(10, 6, columns=9, effect=2.0)]
    found = choose_over_layers(layers, AllocateChoice(method=AllocationMethod.GLOBAL))
    splits = [Split(up, down) for up in range(11) for down in range(11) if up + down <= 10]

    def cost(pair: tuple[Split, Split]) -> float:
        return sum(each.effect * output_error(each, split) for each, split in zip(layers, pair, strict=True))

    def size(pair: tuple[Split, Split]) -> int:
        return sum((s.promoted - s.demoted) * each.columns for each, s in zip(layers, pair, strict=True))

    best = min(cost((a, b)) for a in splits for b in splits if size((a, b)) <= 0)
    assert cost((found[0], found[1])) == pytest.approx(best)
    assert size((found[0], found[1])) <= 0


def test_two_bits_have_one_bit_channels() -> None:
    assert set(channel_bits(layer(20, 7, bits=2), Split(4, 4)).tolist()) == {1, 2, 3}


def test_no_layer_is_left_with_one_bit_alone() -> None:
    layers = {"little": layer(20, 8, bits=2, effect=1e-9), "much": layer(20, 9, bits=2, columns=9, effect=1e9)}
    found = allocate(layers, AllocateChoice(method=AllocationMethod.GLOBAL))
    assert (found["much"] == 3).all()
    assert 0 < int((found["little"] > 1).sum()) < 20


def test_extra_is_a_share() -> None:
    with pytest.raises(ValidationError, match=r"less than or equal to 0\.5"):
        AllocateChoice(method=AllocationMethod.KURTOSIS, extra=0.7)
