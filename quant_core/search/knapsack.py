"""The multiple-choice knapsack: one choice for each of several items, least cost within one or several limits. Exact.

An integer program, solved by HiGHS. Before that, most choices are ruled out by the Lagrangian bound (as in Pisinger, "A
minimal algorithm for the multiple-choice knapsack problem", EJOR 83, 1995, with a multiplier for each limit). The
linear relaxation gives a price for each limit, and a bound L on the least cost. A choice whose priced cost is d above
the best of its item cannot be part of a solution that costs less than L + d. So a program over the choices with d up to
some width, which finds a solution of cost U, is proven best if U - L is at most that width; otherwise once more with
U - L as width. Of 1,000 items with 6 choices, some dozens remain open.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_array, vstack

from quant_spec.errors import QuantizationError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

#: Rows are scaled to this much room, of which HiGHS' tolerance of 1e-6 is a part in 10^12.
_ROOM = 1e6
#: Coefficients of the program's limits, at most: its tolerance of 1e-6 is then a part in 10^9 of the largest.
_LARGEST = 1.0
#: Choices that are open at first, besides one for each item.
_FIRST_OPEN = 30
#: Branches of the search tree after which HiGHS gives what it has; `Picked.bound` says how far that may be off.
_NODES = 200_000


@contextmanager
def _without_stdout() -> Iterator[None]:
    """Throw away what is written to the process' standard output: HiGHS 1.12 has a line of its own, whatever is asked.

    Commands answer with one JSON document there (ERGO-Code/HiGHS#2783).
    """
    sys.stdout.flush()
    kept = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


@dataclass(frozen=True, slots=True)
class Choices:
    """All choices of all items.

    Attributes
    ----------
    item : array, shape (C,), dtype int64, rising
        Which item each choice belongs to; each of 0, 1, … has at least one.
    cost : array, shape (C,), dtype float64, finite
    uses : array, shape (R, C), dtype float64, finite
        What each choice takes of each limit.
    """

    item: Ints
    cost: Floats
    uses: Floats

    @property
    def starts(self) -> Ints:
        """Return the place of each item's first choice, shape (items,)."""
        return np.flatnonzero(np.diff(self.item, prepend=-1))

    def least(self) -> Floats:
        """Return the smallest that can be used of each limit alone, shape (R,)."""
        return np.minimum.reduceat(self.uses, self.starts, axis=1).sum(axis=1)

    def most(self) -> Floats:
        """Return the most that can be used of each limit alone, shape (R,)."""
        return np.maximum.reduceat(self.uses, self.starts, axis=1).sum(axis=1)


@dataclass(frozen=True, slots=True)
class Picked:
    """The place of each item's choice, what they cost together, and a bound below which no solution costs.

    `bound` equals `cost` (but for rounding) unless the solver gave up after many branches.
    """

    places: Ints
    cost: float
    bound: float


@dataclass(frozen=True, slots=True)
class Choice:
    """What one choice costs, and what it takes of the budget."""

    cost: float
    size: float


class OverBudgetError(QuantizationError):
    """No choices fit."""


def cheapest(choices: Choices, limits: Sequence[float]) -> Picked:
    """Return the choices with the least sum of costs, uses within all limits.

    Parameters
    ----------
    choices : Choices
    limits : sequence of float, length R
        `inf` is no limit.

    Raises
    ------
    OverBudgetError
        If no choices fit.
    """
    rows = np.flatnonzero(np.isfinite(limits))
    uses, allowed = choices.uses[rows], np.asarray(limits, dtype=np.float64)[rows]
    slack = 1e-12 * np.abs(allowed)  # what adding up floats may lose
    tightened = allowed.copy()
    while True:
        found = _within(Choices(choices.item, choices.cost, uses), tightened, slack)
        over = uses[:, found.places].sum(axis=1) - allowed
        if (over <= slack).all():
            return found
        # The solver's tolerance let something through: not again.
        tightened -= np.where(over > slack, 2 * over, 0)


def supported(choices: Choices, row: int, limit: float) -> Picked:
    """Return choices within one limit that are the cheapest of all that use no more of it than they do.

    They are best at some price for what they use, which takes no search: a sweep over many limits gives a front all of
    whose points are optimal, though not one for every limit.

    Raises
    ------
    OverBudgetError
        If no choices fit.
    """
    extra, least = _above_least(choices.uses[row : row + 1], choices.item)
    room = limit - float(least.sum())
    if room < -1e-12 * abs(limit):
        raise OverBudgetError("no choices fit the limits")
    size = room if room > 0 else max(float(extra.max()), 1e-300)
    scaled = Choices(choices.item, choices.cost, extra * (_ROOM / size))
    bound = max(room, 0.0) * (_ROOM / size)
    fits = scaled.uses[0] <= bound * (1 + 1e-12) + 1e-9
    prices = _price(scaled, bound, fits)
    priced = np.where(fits, choices.cost + prices @ scaled.uses, np.inf)
    # Of what is equal at this price the least use comes first.
    order = np.lexsort((scaled.uses[0], priced, choices.item))
    places = order[choices.starts]
    cost = float(choices.cost[places].sum())
    return Picked(places, cost, cost)


def choose(items: Sequence[Sequence[Choice]], budget: float) -> list[int]:
    """Return the place of each item's choice with the least sum of costs, sizes within one budget.

    Raises
    ------
    QuantizationError
        If no choices fit.
    """
    flat = [choice for item in items for choice in item]
    choices = Choices(
        np.repeat(np.arange(len(items)), [len(item) for item in items]),
        np.array([choice.cost for choice in flat]),
        np.array([[choice.size for choice in flat]], dtype=np.float64),
    )
    if (least := choices.least()[0]) > budget:
        raise OverBudgetError(f"budget: got {budget}, wanted at least {least:g}, the smallest that fits all items")
    return (cheapest(choices, [budget]).places - choices.starts).tolist()


def _within(choices: Choices, allowed: Floats, slack: Floats) -> Picked:
    """Scale the problem, so that all limits are of one size, and solve it."""
    extra, least = _above_least(choices.uses, choices.item)
    room = allowed - least.sum(axis=1)
    if (room < -slack).any():
        raise OverBudgetError("no choices fit the limits")
    room = room.clip(min=0)
    # A limit without any room leaves only choices that take nothing of it.
    size = np.where(room > 0, room, extra.max(axis=1, initial=0).clip(min=1e-300))
    scaled = Choices(choices.item, choices.cost, extra * (_ROOM / size)[:, None])
    bounds = room * (_ROOM / size)
    return _solve(scaled, bounds, (scaled.uses <= bounds[:, None] * (1 + 1e-12) + 1e-9).all(axis=0))


def _solve(choices: Choices, room: Floats, fits: NDArray[np.bool_]) -> Picked:
    """Solve the scaled problem over the choices that fit at all."""
    if not np.maximum.reduceat(fits, choices.starts).all():
        raise OverBudgetError("no choices fit the limits")
    prices = _prices(choices, room, fits)
    priced = choices.cost + prices @ choices.uses
    priced[~fits] = np.inf
    best = np.minimum.reduceat(priced, choices.starts)
    bound = float(best.sum() - prices @ room)
    above = priced - best[choices.item]
    order = np.sort(above[fits])
    width = float(order[min(len(order), len(best) + _FIRST_OPEN) - 1])
    best_found: Picked | None = None
    while True:
        found = _program(choices, room, fits & (above <= width), width)
        if found is None:
            # Of what costs less than the best so far nothing is left out, so there is nothing that does.
            if best_found is not None:
                return best_found
            if width >= order[-1]:
                raise OverBudgetError("no choices fit the limits")
            width = float(order[-1]) if width == 0 else min(4 * width, float(order[-1]))
            continue
        if best_found is not None and found.cost >= best_found.cost:
            return best_found
        best_found, gap = found, found.cost - bound
        # HiGHS stops a millionth of the width from the best, so it is asked again where the gap is much less.
        if gap <= 1e-13 * abs(found.cost) or 0.999 * gap <= width <= 1.001 * gap or width >= order[-1] <= gap:
            return found
        width = min(gap, float(order[-1]))


def _prices(choices: Choices, room: Floats, fits: NDArray[np.bool_]) -> Floats:
    """Return the price of each limit in the linear relaxation, shape (R,), >= 0."""
    if not len(room) or not fits.any():
        return np.zeros(len(room))
    return _price(choices, float(room[0]), fits) if len(room) == 1 else _several_prices(choices, room, fits)


def _price(choices: Choices, room: float, fits: NDArray[np.bool_]) -> Floats:
    """Return the least price of the only limit at which the best choices of all items fit, by bisection."""
    cost, uses, starts = np.where(fits, choices.cost, np.inf), choices.uses[0], choices.starts

    def taken(price: float) -> float:
        priced = cost + price * uses
        best = priced <= np.minimum.reduceat(priced, starts)[choices.item]
        return float(np.minimum.reduceat(np.where(best, uses, np.inf), starts).sum())

    if taken(0.0) <= room:
        return np.zeros(1)
    # Without any room the choices that fit take nothing, but for rounding.
    low, high, room = 0.0, (float(np.ptp(choices.cost[fits])) or 1.0) / _ROOM, room + 1e-6
    while taken(high) > room:
        low, high = high, 4 * high
    for _ in range(100):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        low, high = (middle, high) if taken(middle) > room else (low, middle)
    return np.array([high])


def _several_prices(choices: Choices, room: Floats, fits: NDArray[np.bool_]) -> Floats:
    """Return the prices of several limits: the duals of the linear program."""
    places = np.flatnonzero(fits)
    spread = float(np.ptp(choices.cost[places])) or 1.0
    items = int(choices.item[-1]) + 1
    relaxed = linprog(
        choices.cost[places] / spread,
        A_ub=csr_array(choices.uses[:, places]),
        b_ub=room,
        A_eq=_one_each(choices.item[places], items),
        b_eq=np.ones(items),
        method="highs",
    )
    if relaxed.x is None:
        raise OverBudgetError("no choices fit the limits")
    return np.maximum(-relaxed.ineqlin.marginals * spread, 0)


def _program(choices: Choices, room: Floats, open_: NDArray[np.bool_], width: float) -> Picked | None:
    """Solve the integer program over the open choices; None if none of them fit."""
    places = np.flatnonzero(open_)
    item = choices.item[places]
    count = np.bincount(item, minlength=int(choices.item[-1]) + 1)
    alone = count[item] == 1
    spent, left = choices.uses[:, places[alone]].sum(axis=1), places[~alone]
    cost = choices.cost[places[alone]].sum()
    if not len(left):
        return Picked(places, float(cost), float(cost)) if (spent <= room + 1e-6).all() else None
    names, own = np.unique(choices.item[left], return_inverse=True)
    lowest = np.minimum.reduceat(choices.cost[left], np.flatnonzero(np.diff(own, prepend=-1)))
    relative = choices.cost[left] - lowest[own]
    unit = width if width > 0 else float(relative.max()) or 1.0
    extra, least = _above_least(choices.uses[:, left], own)
    scale = _LARGEST / extra.max(axis=1, initial=0).clip(min=1e-300)
    rows = LinearConstraint(
        vstack([csr_array(extra * scale[:, None]), _one_each(own, len(names))], format="csr"),
        np.concatenate([np.full(len(room), -np.inf), np.ones(len(names))]),
        np.concatenate([(room - spent - least.sum(axis=1)) * scale, np.ones(len(names))]),
    )
    with _without_stdout():
        found = milp(
            relative / unit,
            integrality=np.ones(len(left)),
            bounds=Bounds(0, 1),
            constraints=rows,
            options={"mip_rel_gap": 0, "node_limit": _NODES},
        )
    if found.x is None:
        return None
    taken = np.concatenate([places[alone], left[found.x > 0.5]])
    taken = taken[np.argsort(choices.item[taken])]
    total = float(choices.cost[taken].sum())
    bound = float(cost + lowest.sum() + found.mip_dual_bound * unit)
    return Picked(taken, total, min(bound, total))


def _above_least(uses: Floats, item: Ints) -> tuple[Floats, Floats]:
    """Return what choices use beyond the least of their item, shape (R, C), and that least, shape (R, items)."""
    least = np.minimum.reduceat(uses, np.flatnonzero(np.diff(item, prepend=-1)), axis=1)
    return uses - least[:, item], least


def _one_each(item: Ints, items: int) -> csr_array:
    """Return the rows that ask for one choice of each item."""
    return csr_array((np.ones(len(item)), (item, np.arange(len(item)))), shape=(items, len(item)))
