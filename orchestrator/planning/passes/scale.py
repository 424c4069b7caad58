"""Scale: what the input channels of groups of units are divided by, and their power-of-two steps (DMQ)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from orchestrator.graph import TaskRef
from orchestrator.planning.costs import Cost, Costs, giga
from orchestrator.planning.draft import Draft, Drawing
from orchestrator.planning.formats import QuantizedUnit, varied_layers
from orchestrator.planning.groups import group_label, unit_groups
from quant_spec.enums import Scaling, Shift
from quant_spec.passes.scale import Scale
from quant_spec.task import per_unit
from quant_spec.tasks.scale import FACTORS, KIND, Inputs, Params

#: Positions of a sample that vote on power-of-two steps, as in `quant_core.methods.dmq.scaling`.
VOTE_POSITIONS = 64
_SCALED_WEIGHT = 900.0  # MACs of one weight in one iteration of learned scales, with its gradient: 30 ns
_CHANNEL = 60.0  # MACs of one element looked at by channel: 2 ns


def scale(draft: Draft) -> Drawing:
    """Leave the factors of each unit, learned against the rounding of `round`."""
    config, rounding = draft.recipe.passes.scale, draft.recipe.passes.round
    if config is None:
        return draft
    factors = dict(draft.factors)
    for group in unit_groups(draft, draft.base_units, lambda units: scale_cost(draft.costs, units, config)):
        params = Params.of(
            config,
            units=tuple(unit.planned.before_allocation() for unit in group),
            seed=draft.recipe.seed,
            forward_batch_size=draft.recipe.calibration.batch_size,
            rounding=rounding.method,
            damping=rounding.damping,
        )
        step_bits = draft.step_bits if varied_layers(group) else None
        inputs = Inputs(draft.model.digest, draft.calibration, step_bits)
        node = draft.node(KIND, params, inputs, scale_cost(draft.costs, group, config), group_label(group))
        factors |= {unit.name: TaskRef(node.id, per_unit(FACTORS, unit.name)) for unit in group}
        yield node
    return replace(draft, factors=factors)


def scale_cost(costs: Costs, group: Sequence[QuantizedUnit], config: Scale) -> Cost:
    """One pass over the calibration set, then iterations on weights."""
    calibration = costs.recipe.calibration
    elements = sum(unit.info.input_elements for unit in group) * costs.calibrated
    work = costs.replay(group[-1].info.depth) + giga(elements * _CHANNEL)
    held = 0
    if config.method is Scaling.LEARNED:
        seen = min(config.samples, calibration.seeds) * costs.recorded_per_seed
        for unit in group:
            for layer in unit.info.layers:
                rows = seen * min(config.positions, layer.positions)
                work += giga(rows * layer.columns**2 + layer.columns**3 / 3)
                work += giga(config.iterations * layer.weights * _SCALED_WEIGHT)
            held += unit.info.hessian_bytes
    return Cost(
        work, costs.memory(calibration.batch_size, costs.cached(held) + _vote_bytes(costs, group, config), reads=True)
    )


def _vote_bytes(costs: Costs, group: Sequence[QuantizedUnit], config: Scale) -> float:
    """Return the bytes of the positions that are kept for the vote on power-of-two steps."""
    kept = min(config.samples, costs.recipe.calibration.seeds) * costs.recorded_per_seed * VOTE_POSITIONS
    channels = sum(
        layer.shape[1]
        for unit in group
        for layer in unit.info.layers
        if config.shift is Shift.VARIANCE or (config.shift is Shift.SKIP and layer.split)
    )
    return 4.0 * kept * channels
