"""Pack: the states of all units in one folder that diffusers loads."""

from __future__ import annotations

from dataclasses import replace

from orchestrator.graph import TaskRef
from orchestrator.planning.costs import DEQUANTIZE, WORKER_BYTES, Cost, Costs, giga
from orchestrator.planning.draft import Draft, Drawing
from quant_spec.tasks.pack import KIND, PACKED, Inputs, Params


def pack(draft: Draft) -> Drawing:
    """Leave the packed model."""
    states = draft.running_order()
    params = Params(sampler=draft.sampler, unknown_timestep=draft.recipe.activations.unknown_timestep)
    inputs = Inputs(draft.model.digest, tuple(states.values()))
    node = draft.node(KIND, params, inputs, pack_cost(draft.costs), f"{len(states)} units")
    yield node
    return replace(draft, packed=TaskRef(node.id, PACKED))


def pack_cost(costs: Costs) -> Cost:
    """Codes are packed, and unpacked again to be checked."""
    return Cost(giga(costs.weights * DEQUANTIZE), WORKER_BYTES + costs.read_bytes + 2 * costs.packed_bytes)
