"""DMQ's tasks: what they are told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from orchestrator.planning.formats import UnitPlan
from quant_spec.passes.round import Round
from quant_spec.passes.scale import Scale
from quant_spec.recipe import Recipe


def scale_parameters(group: Sequence[UnitPlan], config: Scale, rounding: Round, recipe: Recipe) -> dict[str, Any]:
    """Return what the task that scales a group of units is told; scales are learned against the rounding to come."""
    told: dict[str, Any] = {"rounding": rounding.method}
    if rounding.method == "closed_form":
        told["damping"] = rounding.damping
    return {
        "units": [each.parameters() for each in group],
        "seed": recipe.seed,
        "forward_batch_size": recipe.calibration.batch_size,
        **(told if config.method == "learned" else {}),
        **config.parameters(),
    }
