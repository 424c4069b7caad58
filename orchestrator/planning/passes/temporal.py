"""Temporal: the temporal information block as a unit of its own, taken out of the units that its layers lie in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from orchestrator.errors import RecipeError
from orchestrator.graph import TaskRef
from orchestrator.planning.costs import BACKWARD, CALL, TRAIN_WEIGHT, Cost, Costs, giga
from orchestrator.planning.draft import Draft, Drawing
from orchestrator.planning.formats import QuantizedUnit
from orchestrator.planning.model import UnitInfo
from quant_spec.enums import ActivationMode, RoundingMethod, TemporalRounding
from quant_spec.passes.round import RoundFit
from quant_spec.passes.temporal import Temporal
from quant_spec.planned import PlannedLayer, PlannedUnit
from quant_spec.ranges import RangeSpec
from quant_spec.tasks.temporal import KIND, STATE, Inputs, Params

#: Name of the block among the units; no module can have it.
TEMPORAL_UNIT = "@temporal"

_ROUND = RoundFit(method=RoundingMethod.CLOSED_FORM)


def take_out(draft: Draft) -> Draft:
    """Return the draft with the block as a unit of its own, if the recipe has the pass.

    The block has the recipe's `activations.bits` at every step, also where other layers have bits of their own at each.

    Raises
    ------
    RecipeError
        If the model has no such block, or nothing of it is quantized.
    """
    config, model = draft.recipe.passes.temporal, draft.model
    if config is None:
        return draft
    if model.temporal is None:
        raise RecipeError(
            "passes.temporal: got a model that an earlier Quantmill inspected, wanted it added again (models add)"
        )
    found = {
        name: _with_own_ranges(layer, draft.recipe.activations.bits, config)
        for unit in draft.units
        for name, layer in unit.planned.layers.items()
        if name in model.temporal
    }
    if not found:
        raise RecipeError(
            f"passes.temporal: got {'only kept layers' if model.temporal else 'no layer'} that compute "
            "features of the timestep, wanted at least one to quantize"
        )
    layers = tuple(layer for layer in model.layers if layer.name in found)
    info = UnitInfo(
        name=TEMPORAL_UNIT,
        layers=layers,
        attentions=(),
        gmacs=sum(layer.macs for layer in layers) / 1e9,
        input_bytes=0,
        output_bytes=0,
        hessian_bytes=max(4 * layer.columns**2 for layer in layers),
        depth=1.0,
    )
    block = QuantizedUnit(info, PlannedUnit(TEMPORAL_UNIT, {layer.name: found[layer.name] for layer in layers}, {}))
    return replace(draft, block=block, units=_without(draft.units, found), base_units=_without(draft.base_units, found))


def _without(units: Iterable[QuantizedUnit], layers: Mapping[str, PlannedLayer]) -> tuple[QuantizedUnit, ...]:
    """Return units without the block's layers, and without those that have nothing else."""
    rest = (unit.without(layers.keys()) for unit in units)
    return tuple(unit for unit in rest if unit.planned.layers or unit.planned.attentions)


def temporal(draft: Draft) -> Drawing:
    """Leave the block's state."""
    config, block = draft.recipe.passes.temporal, draft.block
    if config is None or block is None:
        return draft
    planned = block.planned
    params = Params.of(config, unit=planned.unit, layers=dict(planned.layers), attentions=dict(planned.attentions))
    inputs = Inputs(draft.model.digest, draft.calibration)
    node = draft.node(KIND, params, inputs, temporal_cost(draft.costs, block, config), f"{len(planned.layers)} layers")
    yield node
    return replace(draft, states={**draft.states, block.name: TaskRef(node.id, STATE)})


def temporal_cost(costs: Costs, block: QuantizedUnit, config: Temporal) -> Cost:
    """Iterations over the block's finite set, which is small."""
    info, layers = block.info, block.planned.layers
    step = giga(len(info.layers) * CALL * (1 + BACKWARD) + info.weights * TRAIN_WEIGHT * 2)
    iterations = config.iterations if config.method is TemporalRounding.RECONSTRUCT else 0
    rounding = sum(
        costs.hessian(layer, _ROUND) + costs.ranged(layer, layers[layer.name]) + costs.codes(layer, _ROUND)
        for layer in info.layers
    )
    return Cost((iterations + 2 * len(info.layers)) * step + rounding, costs.memory(1, info.weights * 4 * 8))


def _with_own_ranges(layer: PlannedLayer, bits: int | None, config: Temporal) -> PlannedLayer:
    """Return a layer of the block: rounded as one, with a range for each trajectory step if the set is calibrated."""
    layer = replace(layer, allocated=False)
    if bits is not None:
        layer = layer.with_bits(bits)
    if not config.finite_set or layer.activation is None:
        return layer
    return replace(
        layer,
        activation=replace(layer.activation, mode=ActivationMode.PER_STEP),
        activation_range=layer.activation_range or RangeSpec(),
    )
