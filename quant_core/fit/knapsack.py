"""The multiple-choice knapsack: one choice for each of several items, least cost within a budget. Exact."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from quant_spec.errors import QuantizationError

#: Most units that a budget is counted in; see `choose`.
MOST_UNITS = 1 << 20


@dataclass(frozen=True, slots=True)
class Choice:
    """What one choice costs, and what it takes of the budget: a whole number of 0 or more."""

    cost: float
    size: int


def choose(items: Sequence[Sequence[Choice]], budget: int) -> list[int]:
    """Return the place of each item's choice with the least sum of costs, sizes within the budget.

    Parameters
    ----------
    items : sequence of sequences of Choice
        The choices of each item.
    budget : int
        What all chosen sizes may add up to.

    Raises
    ------
    QuantizationError
        If no choices fit.

    Notes
    -----
    Counted is by how much a size exceeds the smallest of its item, in units of the greatest common divisor of all these
    differences. If the budget, less all smallest sizes, has at most MOST_UNITS of them, the result is exact. Otherwise
    sizes are rounded up to larger units: the result is within the budget, and best for the rounded sizes.

    Dynamic programming over items and units spent: O(choices * units) time, O(items * units) bytes.
    """
    smallest = sum(min(choice.size for choice in item) for item in items)
    if smallest > budget:
        raise QuantizationError(f"budget: got {budget}, wanted at least {smallest}, the smallest that fits all items")
    # What every choice of an item takes is spent, so that rounding up can't exceed the budget.
    extra = [[choice.size - min(each.size for each in item) for choice in item] for item in items]
    budget -= smallest
    unit = max(math.gcd(*(size for item in extra for size in item)), -(-budget // MOST_UNITS), 1)
    sizes = [[-(-size // unit) for size in item] for item in extra]
    units = min(budget // unit, sum(max(item) for item in sizes))
    best = np.zeros(units + 1)
    taken = np.zeros((len(items), units + 1), dtype=np.uint16)
    for place, item in enumerate(items):
        after = np.full(units + 1, np.inf)
        for number, (choice, size) in enumerate(zip(item, sizes[place], strict=True)):
            if size > units:
                continue
            reached = best[: units + 1 - size] + choice.cost
            better = reached < after[size:]
            after[size:][better] = reached[better]
            taken[place, size:][better] = number
        best = after
    left, found = units, []
    for place in reversed(range(len(items))):
        found.append(int(taken[place, left]))
        left -= sizes[place][found[-1]]
    return found[::-1]
