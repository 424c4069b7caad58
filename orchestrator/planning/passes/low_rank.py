"""Low rank: the 16-bit branches of groups of units' layers, and what their input channels are divided by (SVDQuant)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from orchestrator.errors import RecipeError
from orchestrator.graph import TaskRef
from orchestrator.planning.costs import Cost, Costs, giga
from orchestrator.planning.draft import Draft, Drawing
from orchestrator.planning.formats import QuantizedUnit, varied_layers
from orchestrator.planning.groups import group_label, unit_groups
from orchestrator.planning.model import LayerInfo
from quant_spec.passes.low_rank import LowRank
from quant_spec.task import per_unit
from quant_spec.tasks.low_rank import BRANCHES, FACTORS, KIND, Inputs, Params

_TRIED = 24  # decompositions and roundings of 128 rows that choosing one branch takes


def low_rank(draft: Draft) -> Drawing:
    """Leave the branches of each unit and, if they are smoothed, its factors."""
    config, rounding = draft.recipe.passes.low_rank, draft.recipe.passes.round
    if config is None:
        return draft
    if not any(_branched(unit, config) for unit in draft.units):
        kinds = "Linear or convolution layer" if config.convolutions else "Linear layer (convolutions are left out)"
        raise RecipeError(f"passes.low_rank: got no {kinds} of less than 8 bits, wanted at least one")
    branches, factors = dict(draft.branches), dict(draft.factors)
    for group in unit_groups(draft, draft.units, lambda units: low_rank_cost(draft.costs, units, config)):
        params = Params.of(
            config,
            units=tuple(unit.planned.before_allocation() for unit in group),
            seed=draft.recipe.seed,
            forward_batch_size=draft.recipe.calibration.batch_size,
            rounding=rounding.method,
            damping=rounding.damping,
        )
        inputs = Inputs(
            draft.model.digest,
            draft.calibration,
            draft.step_bits if varied_layers(group) else None,
            tuple(draft.factors[unit.name] for unit in group) if draft.factors else (),
        )
        node = draft.node(KIND, params, inputs, low_rank_cost(draft.costs, group, config), group_label(group))
        for unit in group:
            branches[unit.name] = TaskRef(node.id, per_unit(BRANCHES, unit.name))
            if config.smoothing is not None:
                factors[unit.name] = TaskRef(node.id, per_unit(FACTORS, unit.name))
        yield node
    return replace(draft, branches=branches, factors=factors)


def low_rank_cost(costs: Costs, group: Sequence[QuantizedUnit], config: LowRank) -> Cost:
    """One pass over the calibration set, then decompositions of each weight."""
    calibration = costs.recipe.calibration
    work, held = costs.replay(group[-1].info.depth), 0
    seen = min(config.samples, calibration.seeds) * costs.recorded_per_seed
    for unit in group:
        for layer in _branched(unit, config):
            rows = seen * min(config.positions, layer.positions)
            work += giga(rows * layer.columns**2 + 2 * layer.columns**3)
            work += giga(_TRIED * layer.weights * (min(layer.shape[0], 512) + 4 * config.max_rank))
            held += 4 * layer.columns**2
    return Cost(work, costs.memory(calibration.batch_size, costs.cached(held), reads=True))


def _branched(unit: QuantizedUnit, config: LowRank) -> list[LayerInfo]:
    """Return the layers of a unit that may get a branch."""
    return [
        layer
        for layer in unit.info.layers
        if layer.name in unit.planned.layers
        and unit.planned.layers[layer.name].weight.bits < 8
        and (layer.type == "Linear" or config.convolutions)
    ]
