"""Runs of units that one task takes together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from orchestrator.planning.costs import hessian_bytes
from orchestrator.planning.formats import QuantizedUnit
from quant_spec.passes.round import RoundFit

#: Units that are rounded by one task at most: one pass over the calibration set serves them all.
UNITS_PER_ROUND = 8


def round_groups(
    units: Iterable[QuantizedUnit], config: RoundFit, budget_bytes: float
) -> Iterator[list[QuantizedUnit]]:
    """Split units into runs that one task rounds: at most `UNITS_PER_ROUND`, and Hessians within the budget."""
    group: list[QuantizedUnit] = []
    held = 0
    for unit in units:
        needed = hessian_bytes(unit.info, config)
        if group and (len(group) == UNITS_PER_ROUND or held + needed > budget_bytes):
            yield group
            group, held = [], 0
        group.append(unit)
        held += needed
    if group:
        yield group


def group_label(group: Sequence[QuantizedUnit]) -> str:
    """Return what tasks on a group are called: its unit, or the first and the last."""
    first, last = group[0].name, group[-1].name
    return first if len(group) == 1 else f"{first} .. {last}"
