"""Round: weight grids, codes and activation ranges of groups of units, without gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from orchestrator.graph import TaskRef
from orchestrator.planning.costs import QUANTIZE, Cost, Costs, giga, hessian_bytes
from orchestrator.planning.draft import Draft, Drawing
from orchestrator.planning.formats import QuantizedUnit, allocated_layers, varied_layers
from orchestrator.planning.groups import group_label, unit_groups
from quant_spec.enums import RoundingMethod
from quant_spec.passes.round import RoundFit
from quant_spec.task import per_unit
from quant_spec.tasks.round import KIND, STATE, Inputs, Params


def round_units(draft: Draft) -> Drawing:
    """Leave the state of each unit, unless they come from a menu."""
    if draft.recipe.passes.menu is not None:
        return draft
    passes = draft.recipe.passes
    config: RoundFit = passes.round
    if passes.round.answers and passes.exceptions is None:
        config = RoundFit()  # grids and ranges; `answer` chooses codes
    states = dict(draft.states)
    for group in unit_groups(draft, draft.units, lambda units: round_cost(draft.costs, units, config)):
        params = Params.of(
            config,
            units=tuple(unit.planned for unit in group),
            seed=draft.recipe.seed,
            forward_batch_size=draft.recipe.calibration.batch_size,
        )
        inputs = Inputs(
            model=draft.model.digest,
            calibration=draft.calibration,
            step_bits=draft.step_bits if varied_layers(group) else None,
            factors=tuple(draft.factors[unit.name] for unit in group) if draft.factors else (),
            branches=tuple(draft.branches[unit.name] for unit in group) if draft.branches else (),
            allocation=draft.allocation if allocated_layers(group) else None,
        )
        node = draft.node(KIND, params, inputs, round_cost(draft.costs, group, config), group_label(group))
        states |= {unit.name: TaskRef(node.id, per_unit(STATE, unit.name)) for unit in group}
        yield node
    return replace(draft, states=states)


def round_cost(costs: Costs, group: Sequence[QuantizedUnit], config: RoundFit) -> Cost:
    """One pass over the calibration set as far as the last unit of the group, then each layer alone."""
    measured = sum(unit.info.input_elements for unit in group) * costs.calibrated
    work = costs.replay(group[-1].info.depth) + giga(measured * QUANTIZE)
    hessians = 0
    for unit in group:
        for layer in unit.info.layers:
            if layer.name in unit.planned.layers:
                work += costs.hessian(layer, config) + costs.ranged(layer, unit.planned.layers[layer.name])
                work += costs.codes(layer, config)
        hessians += hessian_bytes(unit.info, config)
    extra = costs.cached(hessians) + 3 * _largest_hessian(group, config)
    if costs.model.streamed:  # else codes take the place of weights
        extra += 2 * sum(unit.info.weights for unit in group)
    return Cost(work, costs.memory(costs.recipe.calibration.batch_size, extra, reads=True))


def _largest_hessian(group: Sequence[QuantizedUnit], config: RoundFit) -> int:
    """Return the bytes of the largest second moment of a layer."""
    if config.method is not RoundingMethod.CLOSED_FORM:
        return 0
    return max(4 * layer.columns**2 for unit in group for layer in unit.info.layers)
