"""Answer: the codes of all units chosen again, each layer's for what the quantized layers before it give (GPTAQ)."""

from __future__ import annotations

from dataclasses import replace

from orchestrator.errors import RecipeError
from orchestrator.graph import TaskRef
from orchestrator.planning.costs import GIB, Cost, Costs, giga
from orchestrator.planning.draft import Draft, Drawing
from quant_spec.passes.round import Round
from quant_spec.task import per_unit
from quant_spec.tasks.answer import KIND, STATE, Inputs, Params


def answer(draft: Draft) -> Drawing:
    """Leave the states with codes that answer for the layers before; the temporal block's is left as it is."""
    config = draft.recipe.passes.round
    if not config.answers:
        return draft
    _check_memory(draft, config)
    ranges = {name: layer.weight_range for unit in draft.units for name, layer in unit.planned.layers.items()}
    params = Params.of(config, ranges=ranges, seed=draft.recipe.seed)
    states = tuple(draft.states[unit.name] for unit in draft.units)
    inputs = Inputs(draft.model.digest, draft.calibration, states)
    node = draft.node(KIND, params, inputs, answer_cost(draft, config), f"{len(states)} units")
    yield node
    made = {unit.name: TaskRef(node.id, per_unit(STATE, unit.name)) for unit in draft.units}
    return replace(draft, states={**draft.states, **made})


def _check_memory(draft: Draft, config: Round) -> None:
    """Refuse, with what is needed, a budget that all steps of the samples exceed, exact and quantized side by side.

    Fewer samples are for the user to ask for: with too few rows codes answer for what is chance.
    """
    rows = _rows_at_once(draft.costs, config)
    samples, needed = rows // draft.costs.recorded_steps, 2 * rows * draft.costs.live_bytes
    if needed > draft.cache_bytes:
        raise RecipeError(
            f"memory.budget_gib: got {draft.recipe.memory.budget_gib:g} with passes.round.inputs quantized, wanted "
            f"{needed / GIB:.3g} at least, which {samples} samples (passes.round.samples) take at all steps"
        )


def _rows_at_once(costs: Costs, config: Round) -> int:
    """Return the rows of the calibration set that answer for the layers before: some of each step."""
    return min(config.samples * costs.recorded_steps, costs.calibrated)


def answer_cost(draft: Draft, config: Round) -> Cost:
    """One forward of all rows in both models, then each layer alone."""
    costs = draft.costs
    rows = _rows_at_once(costs, config)
    work = costs.quantized_forward(rows, rows) + costs.forward(rows, rows)
    largest = 0
    for unit in draft.units:
        for layer in unit.info.layers:
            if layer.name in unit.planned.layers:
                products = rows * min(config.positions, layer.positions) * layer.weights
                work += costs.hessian(layer, config) + giga(products) + costs.codes(layer, config)
                work += costs.ranged(layer, unit.planned.layers[layer.name])
                largest = max(largest, 4 * layer.columns**2)
    return Cost(work, costs.memory(0, 2 * rows * costs.live_bytes + 4 * largest + costs.weights, reads=True))
