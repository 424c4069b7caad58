"""Budgets that no choice meets, or that all choices stay below."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from quant_core.search.knapsack import OverBudgetError, cheapest
from quant_core.search.space import Space
from quant_spec.search import SearchBudget


def unmet_limits(budgets: Sequence[SearchBudget], spaces: Mapping[str, Space]) -> Iterator[dict[str, Any]]:
    """Yield the limits that no variant can meet, or that are above all that any can use.

    Each as `quant_spec.tasks.propose` has it: place of the budget, name of the limit, what was asked for, the smallest
    and the largest that is reached.
    """
    reach = [space.reach() for space in spaces.values()]
    for place, budget in enumerate(budgets):
        found = []
        for name, got in budget.limits().items():
            smallest, largest = min(each[name][0] for each in reach), max(each[name][1] for each in reach)
            if not smallest * (1 - 1e-12) <= got <= largest * (1 + 1e-12):
                found.append({"budget": place, "limit": name, "got": got, "smallest": smallest, "largest": largest})
        if not found and not any(_fits(space, budget) for space in spaces.values()):
            name, got = next(iter(budget.limits().items()))
            found.append({"budget": place, "limit": name, "got": got, "smallest": None, "largest": None})
        yield from found


def _fits(space: Space, budget: SearchBudget) -> bool:
    try:
        cheapest(space.choices, space.limits(budget))
    except OverBudgetError:
        return False
    return True
