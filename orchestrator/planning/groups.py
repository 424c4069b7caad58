"""Runs of units that one task takes together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from orchestrator.planning.costs import hessian_bytes
from orchestrator.planning.formats import UnitPlan
from quant_spec.passes.round import Round

#: Units that are rounded by one task at most: one pass over the calibration set serves them all.
UNITS_PER_ROUND = 8


def round_groups(plans: Sequence[UnitPlan], config: Round, budget_bytes: float) -> Iterator[list[UnitPlan]]:
    """Split units into runs that one task rounds: at most `UNITS_PER_ROUND`, and Hessians within the budget."""
    group: list[UnitPlan] = []
    held = 0
    for each in plans:
        needed = hessian_bytes(each.unit, config)
        if group and (len(group) == UNITS_PER_ROUND or held + needed > budget_bytes):
            yield group
            group, held = [], 0
        group.append(each)
        held += needed
    if group:
        yield group


def group_label(group: Sequence[UnitPlan]) -> str:
    """Return what tasks on a group are called: its unit, or the first and the last."""
    first, last = group[0].unit.name, group[-1].unit.name
    return first if len(group) == 1 else f"{first} .. {last}"
