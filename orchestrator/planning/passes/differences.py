"""Differences: layers of the quantized model read differences between steps, with ranges found in closed loop."""

from __future__ import annotations

from dataclasses import replace

from orchestrator.errors import RecipeError
from orchestrator.graph import TaskRef
from orchestrator.planning.costs import QUANTIZE, Cost, Costs, giga
from orchestrator.planning.draft import Draft, Drawing
from orchestrator.planning.sensitivity import step_gains_node
from quant_spec.passes.differences import Differences
from quant_spec.task import per_unit
from quant_spec.tasks.differences import KIND, STATE, Inputs, Params
from quant_spec.tasks.step_gains import GAINS

_CHOICE = 5e7  # MACs of each layer's choice of a grid at one step: 37 candidates for 4,096 values, twice


def differences(draft: Draft) -> Drawing:
    """Leave the states with layers in differences."""
    config = draft.recipe.passes.differences
    if config is None:
        return draft
    layers = tuple(name for unit in draft.units for name in unit.changing)
    if not layers:
        raise RecipeError(
            "passes.differences: got exceptions that state the bits of every layer, wanted one whose bits are left open"
        )
    states = draft.running_order()
    gains = draft.gains
    if config.by_effect and gains is None:
        measured = step_gains_node(draft, tuple(states.values()))
        yield measured
        gains = TaskRef(measured.id, GAINS)
    params = Params.of(config, layers=layers, seed=draft.recipe.seed)
    inputs = Inputs(draft.model.digest, draft.calibration, tuple(states.values()), gains if config.by_effect else None)
    node = draft.node(KIND, params, inputs, differences_cost(draft.costs, config, len(layers)), f"{len(layers)} layers")
    yield node
    return replace(draft, states={unit: TaskRef(node.id, per_unit(STATE, unit)) for unit in states})


def differences_cost(costs: Costs, config: Differences, layers: int) -> Cost:
    """One batch along the whole trajectory, each layer choosing a grid at every step; twice where bits are chosen by
    effect, and two samples from each layer on."""
    steps = costs.recipe.sampler.num_inference_steps
    rows = min(config.samples, costs.calibrated // steps)
    work = costs.quantized_forward(rows * steps, rows) + giga(
        steps * (layers * _CHOICE + rows * costs.elements * QUANTIZE)
    )
    held = rows * min(config.state_mib * 2**20, 8 * costs.elements)
    if config.by_effect:
        work = 2 * work + layers * costs.forward(2 * steps, steps) / 2
        # What all layers gave, of one sample at all steps; and a second model.
        held = max(held, steps * 4 * costs.elements) + costs.model_bytes
    return Cost(work, costs.memory(rows, costs.model_bytes + held))
