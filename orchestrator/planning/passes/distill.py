"""Distill: the whole quantized model tuned, after the trajectories that it is distilled from (MPQ-DM)."""

from __future__ import annotations

from dataclasses import replace

from orchestrator.graph import TaskRef
from orchestrator.planning.costs import BACKWARD, CALL, TRAIN_ELEMENT, TRAIN_WEIGHT, WORKER_BYTES, Cost, Costs, giga
from orchestrator.planning.draft import Draft, Drawing
from orchestrator.planning.references import reference
from orchestrator.planning.sensitivity import step_gains_node
from orchestrator.planning.shards import shards
from quant_spec.enums import WeightCodes
from quant_spec.passes.distill import Distill
from quant_spec.task import per_unit
from quant_spec.tasks.distill import KIND, STATE, Inputs, Params
from quant_spec.tasks.reference import REFERENCE
from quant_spec.tasks.step_gains import GAINS

_BACKWARD_FROZEN = 1.3  # what a backward pass costs, in forward passes, where most weights need no gradient
_RELATION = 500.0  # MACs of one pair of positions related, with gradient: 17 ns


def distill(draft: Draft) -> Drawing:
    """Leave the tuned states, if codes are learned."""
    return _distill(draft, WeightCodes.LEARNED)


def distill_frozen(draft: Draft) -> Drawing:
    """Leave the tuned states, if codes are frozen: what else there is to learn, after all bits are chosen."""
    return _distill(draft, WeightCodes.FROZEN)


def _distill(draft: Draft, codes: WeightCodes) -> Drawing:
    config = draft.recipe.passes.distill
    if config is None or config.codes is not codes:
        return draft
    trajectories: list[TaskRef] = []
    for shard in shards(config.first_seed, config.seeds, config.shard_seeds, recorded=config.seeds):
        node = reference(draft, shard, shard.count)
        trajectories.append(TaskRef(node.id, REFERENCE))
        yield node
    states = draft.running_order()
    gains = draft.gains
    if config.effect and gains is None:
        measured = step_gains_node(draft, tuple(states.values()))
        yield measured
        gains = TaskRef(measured.id, GAINS)
    params = Params.of(config, seed=draft.recipe.seed)
    inputs = Inputs(draft.model.digest, tuple(trajectories), tuple(states.values()), gains if config.effect else None)
    node = draft.node(KIND, params, inputs, distill_cost(draft.costs, config), f"{config.iterations} iterations")
    yield node
    return replace(draft, states={unit: TaskRef(node.id, per_unit(STATE, unit)) for unit in states}, gains=gains)


def distill_cost(costs: Costs, config: Distill) -> Cost:
    """Iterations forward and back, the full-precision model beside them for relations."""
    batch, is_frozen = config.batch_size, config.codes is WeightCodes.FROZEN
    learned = 0 if is_frozen else costs.weights
    step = batch * costs.model.gmacs * (1 + (_BACKWARD_FROZEN if is_frozen else BACKWARD)) + giga(
        3 * costs.layers * CALL + learned * TRAIN_WEIGHT + batch * costs.elements * TRAIN_ELEMENT
    )
    if config.relations:
        step += costs.forward(batch, batch) + giga(batch * config.positions**2 * _RELATION)
    # Of each weight: itself and its gradient, moments and what they are made from, or what scales are multiplied with.
    graph = batch * 4 * costs.elements * 12 + costs.weights * 4 * (2 if is_frozen else 16)
    return Cost(config.iterations * step, int(WORKER_BYTES + 2 * costs.model_bytes + graph))
