"""The temporal information block as a unit of its own, taken out of the units that its layers lie in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from orchestrator.errors import RecipeError
from orchestrator.planning.formats import UnitPlan
from orchestrator.planning.model import ModelInfo, UnitInfo
from quant_spec.passes.temporal import Temporal
from quant_spec.recipe import Recipe

#: Name of the block among the units; no module can have it.
TEMPORAL_UNIT = "@temporal"


def take_out(
    model: ModelInfo, plans: Sequence[UnitPlan], recipe: Recipe, config: Temporal
) -> tuple[UnitPlan, list[UnitPlan]]:
    """Return the block's plan, and the plans of the units without its layers.

    The block has the recipe's `activations.bits` at every step, also where other layers have bits of their own at each.

    Raises
    ------
    RecipeError
        If the model has no such block, or nothing of it is quantized.
    """
    if model.temporal is None:
        raise RecipeError(
            "passes.temporal: got a model that an earlier Quantmill inspected, wanted it added again (models add)"
        )
    found = {name: data for plan in plans for name, data in plan.layers.items() if name in model.temporal}
    if not found:
        raise RecipeError(
            f"passes.temporal: got {'only kept layers' if model.temporal else 'no layer'} that compute "
            "features of the timestep, wanted at least one to quantize"
        )
    layers = [layer for layer in model.layers if layer.name in found]
    unit = UnitInfo(
        name=TEMPORAL_UNIT,
        layers=tuple(layers),
        attentions=(),
        gmacs=sum(layer.macs for layer in layers) / 1e9,
        input_bytes=0,
        output_bytes=0,
        hessian_bytes=max(4 * layer.columns**2 for layer in layers),
        depth=1.0,
    )
    block = UnitPlan(unit, {layer.name: _format(found[layer.name], recipe, config) for layer in layers}, {})
    rest = [replace(plan, layers={k: v for k, v in plan.layers.items() if k not in found}) for plan in plans]
    return block, [plan for plan in rest if plan.layers or plan.attentions]


def holds(plan: UnitPlan, block: UnitPlan) -> bool:
    """Say whether layers of the block lie in a unit."""
    return any(layer.name in block.layers for layer in plan.unit.layers)


def _format(layer: dict[str, Any], recipe: Recipe, config: Temporal) -> dict[str, Any]:
    """Return a layer's format with a range for each trajectory step, if its finite set is to be calibrated."""
    layer = {key: value for key, value in layer.items() if key != "allocated"}  # rounded as one, with its own bits
    activation = layer["activation"]
    if activation is not None and activation["bits"] is None:
        activation = activation | {"bits": recipe.activations.bits}
    if not config.finite_set or activation is None:
        return layer | {"activation": activation}
    ranges = layer["activation_range"] or {"method": "minmax"}
    return layer | {"activation": activation | {"mode": "per_step"}, "activation_range": ranges}
