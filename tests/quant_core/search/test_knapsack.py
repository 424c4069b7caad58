from __future__ import annotations

import os
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quant_core.search.knapsack import Choice, Choices, OverBudgetError, _without_stdout, cheapest, choose, supported
from quant_spec.errors import QuantizationError

ITEMS = st.lists(
    st.lists(st.builds(Choice, st.floats(0, 100), st.integers(0, 12)), min_size=1, max_size=4), min_size=1, max_size=5
)


def total(items: list[list[Choice]], found: list[int]) -> tuple[float, int]:
    chosen = [item[place] for item, place in zip(items, found, strict=True)]
    return sum(choice.cost for choice in chosen), sum(choice.size for choice in chosen)


@settings(max_examples=150, deadline=None)
@given(items=ITEMS, room=st.integers(0, 30), scale=st.sampled_from([1, 7, 1_000_003]))
def test_choose_is_as_good_as_trying_everything(items: list[list[Choice]], room: int, scale: int) -> None:
    items = [[Choice(choice.cost, scale * choice.size) for choice in item] for item in items]
    budget = sum(min(choice.size for choice in item) for item in items) + room
    tried = (total(items, list(found)) for found in product(*(range(len(item)) for item in items)))
    best = min(cost for cost, size in tried if size <= budget)
    cost, size = total(items, choose(items, budget))
    assert cost == pytest.approx(best, abs=1e-9, rel=1e-9)
    assert size <= budget


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**31), rows=st.integers(2, 3), tightness=st.floats(0, 1))
def test_several_limits_are_kept_and_nothing_within_them_is_better(seed: int, rows: int, tightness: float) -> None:
    generator = np.random.default_rng(seed)
    item = np.repeat(np.arange(4), 3)
    choices = Choices(item, generator.exponential(1e-9, 12), generator.integers(0, 10**9, (rows, 12)).astype(float))
    limits = choices.least() + tightness * (choices.most() - choices.least())
    sums = [
        (float(choices.cost[list(found)].sum()), bool((choices.uses[:, list(found)].sum(axis=1) <= limits).all()))
        for found in product(range(3), range(3, 6), range(6, 9), range(9, 12))
    ]
    fitting = [cost for cost, fits in sums if fits]
    if not fitting:
        with pytest.raises(OverBudgetError):
            cheapest(choices, limits.tolist())
        return
    picked = cheapest(choices, limits.tolist())
    assert picked.cost == pytest.approx(min(fitting), rel=1e-9)
    assert picked.bound == pytest.approx(picked.cost, rel=1e-9)
    assert (choices.uses[:, picked.places].sum(axis=1) <= limits).all()


def many(items: int) -> Choices:
    """Return items as layers are: bytes by widths, damages that fall by 6 dB a bit."""
    generator = np.random.default_rng(0)
    widths = np.tile([2, 3, 4, 5, 6, 8], items)
    parameters = np.repeat(generator.integers(5, 500, items) * 1000, 6)
    damage = parameters * np.repeat(np.exp(generator.normal(0, 2, items)), 6) * 4.0**-widths
    return Choices(np.repeat(np.arange(items), 6), damage, (parameters * widths // 8)[None].astype(float))


def test_a_thousand_layers_are_solved_exactly() -> None:
    """The bound that comes with a solution proves it; in it every byte counts."""
    choices = many(1000)
    for share in (0.05, 0.4, 0.9):
        limit = float(choices.least()[0] + share * (choices.most() - choices.least())[0])
        picked = cheapest(choices, [limit])
        assert picked.cost == pytest.approx(picked.bound, rel=1e-12)
        assert choices.uses[0, picked.places].sum() <= limit
        assert choices.uses[0, picked.places].sum() > limit * (1 - 1e-4)


def test_a_budget_that_nothing_fits_is_refused() -> None:
    with pytest.raises(QuantizationError, match="budget: got 4, wanted at least 5, the smallest that fits all items"):
        choose([[Choice(0.0, 2), Choice(0.0, 9)], [Choice(0.0, 3)]], 4)


def test_supported_choices_are_the_best_of_their_own_size() -> None:
    choices = many(40)
    for share in np.linspace(0, 1, 7):
        limit = float(choices.least()[0] + share * (choices.most() - choices.least())[0])
        found = supported(choices, 0, limit)
        used = float(choices.uses[0, found.places].sum())
        assert used <= limit
        assert found.cost == pytest.approx(cheapest(choices, [used]).cost, rel=1e-9)
    with pytest.raises(OverBudgetError):
        supported(choices, 0, float(choices.least()[0]) - 1)


def test_the_solver_says_nothing_on_standard_output(capfd: pytest.CaptureFixture[str]) -> None:
    with _without_stdout():
        os.write(1, b"a line of the solver's own\n")
    os.write(1, b"after it\n")
    assert capfd.readouterr().out == "after it\n"
