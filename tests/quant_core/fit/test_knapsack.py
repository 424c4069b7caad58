from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quant_core.fit.knapsack import MOST_UNITS, Choice, choose
from quant_spec.errors import QuantizationError

ITEMS = st.lists(
    st.lists(st.builds(Choice, st.floats(0, 100), st.integers(0, 12)), min_size=1, max_size=4), min_size=1, max_size=5
)


def total(items: list[list[Choice]], found: list[int]) -> tuple[float, int]:
    chosen = [item[place] for item, place in zip(items, found, strict=True)]
    return sum(choice.cost for choice in chosen), sum(choice.size for choice in chosen)


@settings(max_examples=150, deadline=None)
@given(items=ITEMS, room=st.integers(0, 30), scale=st.sampled_from([1, 7]))
def test_choose_is_as_good_as_trying_everything(items: list[list[Choice]], room: int, scale: int) -> None:
    items = [[Choice(choice.cost, scale * choice.size) for choice in item] for item in items]
    budget = sum(min(choice.size for choice in item) for item in items) + room
    tried = (total(items, list(found)) for found in product(*(range(len(item)) for item in items)))
    best = min(cost for cost, size in tried if size <= budget)
    cost, size = total(items, choose(items, budget))
    assert cost == pytest.approx(best, abs=1e-9)
    assert size <= budget


@settings(max_examples=10, deadline=None)
@given(items=ITEMS, room=st.integers(0, 30))
def test_coarser_units_stay_within_the_budget(items: list[list[Choice]], room: int) -> None:
    # odd sizes with a greatest common divisor of 1, in a budget of more than MOST_UNITS of that
    items = [
        [Choice(choice.cost, MOST_UNITS * choice.size + number) for number, choice in enumerate(item)] for item in items
    ]
    budget = sum(min(choice.size for choice in item) for item in items) + MOST_UNITS * room + 1
    assert total(items, choose(items, budget))[1] <= budget


def test_a_budget_that_nothing_fits_is_refused() -> None:
    with pytest.raises(QuantizationError, match="budget: got 4, wanted at least 5, the smallest that fits all items"):
        choose([[Choice(0.0, 2), Choice(0.0, 9)], [Choice(0.0, 3)]], 4)
