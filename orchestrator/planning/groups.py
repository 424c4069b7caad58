"""Runs of units that one task takes together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from orchestrator.planning.costs import Cost, hessian_bytes
from orchestrator.planning.draft import Draft
from orchestrator.planning.formats import QuantizedUnit

#: What the units of a task take by themselves before another task begins, by what the forwards cost that reach them:
#: every task runs the model again as far as its last unit, so many small ones do little else.
OWN_WORK = 4.0
#: Share of the model that forwards are taken to reach at least, as a task's start costs something too.
LEAST_DEPTH = 0.1


def unit_groups(
    draft: Draft, units: Iterable[QuantizedUnit], cost: Callable[[Sequence[QuantizedUnit]], Cost]
) -> Iterator[list[QuantizedUnit]]:
    """Split units into runs that one task takes, after one pass over the calibration set as far as the last of them.

    A run ends where its own work is `OWN_WORK` times that pass, and before second moments exceed the memory budget.

    Parameters
    ----------
    cost : callable
        What a task on a run costs, that pass (`Costs.replay`) included.
    """
    group: list[QuantizedUnit] = []
    held, own = 0, 0.0
    for unit in units:
        needed = hessian_bytes(unit.info, draft.recipe.passes.round)
        if group and held + needed > draft.cache_bytes:
            yield group
            group, held, own = [], 0, 0.0
        group.append(unit)
        held += needed
        own += cost([unit]).work - draft.costs.replay(unit.info.depth)
        if own >= OWN_WORK * draft.costs.replay(max(LEAST_DEPTH, unit.info.depth)):
            yield group
            group, held, own = [], 0, 0.0
    if group:
        yield group


def group_label(group: Sequence[QuantizedUnit]) -> str:
    """Return what tasks on a group are called: its unit, or the first and the last."""
    first, last = group[0].name, group[-1].name
    return first if len(group) == 1 else f"{first} .. {last}"
