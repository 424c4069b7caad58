"""The weight bits of one recipe: the least damage within a budget, and what is refused."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from quant_core.search.chosen import Chosen, choose_bits
from quant_spec.errors import InvalidInputError
from quant_spec.search import SearchBudget

WIDTHS = (2, 4, 8)
SIZES = {"conv": 900, "ff": 400, "out": 50}
WEIGHT = {"conv": 1.0, "ff": 30.0, "out": 2.0}


def entry(name: str) -> dict[str, Any]:
    weights = {
        str(bits): {"damage": WEIGHT[name] * 4.0**-bits, "bytes": SIZES[name] * bits // 8 + 7} for bits in WIDTHS
    }
    return {
        "weights": weights,
        "activations": {"8": [0.5]},
        "keep": {"damage": 0.0, "bytes": 4 * SIZES[name]},
        "parameters": SIZES[name],
        "macs": 1,
    }


TABLE: dict[str, Any] = {
    "layers": {
        **{name: entry(name) for name in SIZES},
        "attn": {"weights": {}, "activations": {"8": [0.1]}, "parameters": 0, "macs": 1},
    },
    "base_bytes": 1000,
    "unit": {"conv": "a", "ff": "a", "out": "b", "attn": "b"},
}
OWN: dict[str, Any] = {"conv": 4, "ff": 4, "out": 8}


def size_of(bits: dict[str, int]) -> int:
    return 1000 + sum(TABLE["layers"][name]["weights"][str(width)]["bytes"] for name, width in bits.items())


def least(limit: float, allowed: dict[str, tuple[int, ...]]) -> float:
    """Return the least damage within some bytes, by trying all."""
    found = []
    for widths in itertools.product(*allowed.values()):
        bits = dict(zip(allowed, widths, strict=True))
        if size_of(bits) <= limit:
            found.append(sum(TABLE["layers"][n]["weights"][str(w)]["damage"] for n, w in bits.items()))
    return min(found)


def check(found: Chosen, limit: float, allowed: dict[str, tuple[int, ...]]) -> None:
    assert found.price.uses["bytes"] == size_of(dict(found.bits)) <= limit
    assert found.price.damage == pytest.approx(least(limit, allowed))


def test_without_a_budget_it_is_as_many_bytes_as_the_recipes_own_bits() -> None:
    found = choose_bits(TABLE, OWN, (), None)
    check(found, size_of(OWN), dict.fromkeys(SIZES, WIDTHS))
    assert found.bits == {"conv": 2, "ff": 8, "out": 8}
    assert found.own.uses["bytes"] == size_of(OWN)
    assert found.price.damage < 0.6 * found.own.damage


@pytest.mark.parametrize("limit", [1360, 1500, 1700, 2300])
def test_no_other_choice_within_the_bytes_does_less_damage(limit: int) -> None:
    check(choose_bits(TABLE, OWN, (), SearchBudget(bytes=limit)), limit, dict.fromkeys(SIZES, WIDTHS))


def test_mean_bits_count_weights() -> None:
    found = choose_bits(TABLE, OWN, (), SearchBudget(weight_bits_mean=4.5))
    assert found.price.uses["weight_bits_mean"] <= 4.5
    assert found.bits["ff"] == 8


def test_of_more_than_all_choices_take_the_widest_are_taken() -> None:
    found = choose_bits(TABLE, OWN, (), SearchBudget(bytes=10_000))
    assert set(found.bits.values()) == {8}


def test_of_two_limits_both_hold() -> None:
    found = choose_bits(TABLE, OWN, (), SearchBudget(weight_bits_mean=8, bytes=1500))
    check(found, 1500, dict.fromkeys(SIZES, WIDTHS))


def test_a_fixed_layer_has_its_bits_and_others_pay_for_it() -> None:
    found = choose_bits(TABLE, OWN, ("conv",), None)
    assert found.bits["conv"] == 4
    check(found, size_of(OWN), {"conv": (4,), "ff": WIDTHS, "out": WIDTHS})


def test_a_layer_in_full_precision_counts_its_bytes_and_is_no_choice() -> None:
    own = {name: bits for name, bits in OWN.items() if name != "out"}
    found = choose_bits(TABLE, own, (), None)
    assert set(found.bits) == {"conv", "ff"}
    assert found.own.uses["bytes"] == size_of(own) + 4 * SIZES["out"]


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"bytes": 1200}, r"passes\.choose\.bytes: got 1\.2 kB, wanted 1\.4 kB to 2\.4 kB"),
        ({"weight_bits_mean": 1.5}, r"weight_bits_mean: got 1\.5, wanted 2 to 8, which is what the choices reach"),
    ],
)
def test_a_budget_that_is_out_of_reach_is_refused(budget: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        choose_bits(TABLE, OWN, (), SearchBudget(**budget))


def test_bits_that_were_not_measured_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="layer ff: got 3 bits, wanted one of the table's 2, 4, 8"):
        choose_bits(TABLE, OWN | {"ff": 3}, (), None)
