"""Reconstruct: the rounding of each unit learned, all at once or one after another."""

from __future__ import annotations

from dataclasses import replace

from orchestrator.graph import TaskRef
from orchestrator.planning.costs import BACKWARD, CALL, TRAIN_ELEMENT, TRAIN_WEIGHT, WORKER_BYTES, Cost, Costs, giga
from orchestrator.planning.draft import Draft, Drawing, Source
from orchestrator.planning.model import UnitInfo
from quant_spec.enums import UnitInputs
from quant_spec.passes.reconstruct import Reconstruct
from quant_spec.tasks.reconstruct import KIND, STATE, Inputs, Params


def reconstruct(draft: Draft) -> Drawing:
    """Leave the learned state of each unit."""
    config = draft.recipe.passes.reconstruct
    if config is None:
        return draft
    block, in_order = draft.block, config.inputs is UnitInputs.QUANTIZED
    params = Params.of(
        config,
        seed=draft.recipe.seed,
        cache_bytes=draft.cache_bytes,
        forward_batch_size=draft.recipe.calibration.batch_size,
    )
    states = dict(draft.states)
    earlier: list[Source] = []
    for unit in draft.units:
        inputs = Inputs(
            model=draft.model.digest,
            calibration=draft.calibration,
            state=states[unit.name],
            earlier=tuple(earlier) if in_order else (),
            temporal=states[block.name] if block and (in_order or _holds(unit.info, block.info)) else None,
        )
        node = draft.node(KIND, params, inputs, reconstruct_cost(draft.costs, unit.info, config), unit.name)
        states[unit.name] = TaskRef(node.id, STATE)
        earlier.append(states[unit.name])
        yield node
    return replace(draft, states=states)


def reconstruct_cost(costs: Costs, unit: UnitInfo, config: Reconstruct) -> Cost:
    """A unit's inputs and outputs are recorded, then there are iterations on mini-batches."""
    calibration, in_order = costs.recipe.calibration, config.inputs is UnitInputs.QUANTIZED
    passes = costs.replay(unit.depth)
    if in_order:
        passes += costs.quantized_forward(costs.calibrated, calibration.batch_size) * unit.depth
    batch = config.batch_size
    step = batch * unit.gmacs * (1 + BACKWARD) + giga(
        len(unit.layers) * CALL * (1 + BACKWARD)
        + unit.weights * TRAIN_WEIGHT
        + batch * unit.input_elements * TRAIN_ELEMENT
    )
    graph = batch * 4 * unit.input_elements * 8 + unit.weights * 4 * 8
    cache = costs.cached(costs.calibrated * (unit.input_bytes + unit.output_bytes))
    memory = WORKER_BYTES + (2 if in_order else 1) * costs.read_bytes + graph + cache
    least = costs.memory(calibration.batch_size, 0, reads=True)
    held, on_gpu = int(max(memory, least)), max(memory - cache, least)
    return Cost(passes + config.iterations * step, held, held - on_gpu)


def _holds(unit: UnitInfo, block: UnitInfo) -> bool:
    """Say whether layers of the block lie in a unit."""
    names = {layer.name for layer in block.layers}
    return any(layer.name in names for layer in unit.layers)
