"""Mix: put the states of units together from those that a menu has.

The format of a state is that of `quant_core.fit.unit_state`.
"""

from __future__ import annotations

from collections import defaultdict

from safetensors.torch import load
from torch import Tensor

from quant_core.fit.menu import mix_unit
from quant_core.fit.unit_state import UnitState
from quant_spec.task import per_unit
from quant_spec.tasks.mix import STATE, Inputs, Params
from workers.execution.context import TaskContext, TaskOutput
from workers.tasks.inputs import read_states


def run(params: Params, inputs: Inputs[str], context: TaskContext) -> TaskOutput:
    """Mix some units."""
    weights, activations = _by_unit(inputs.weights, context), _by_unit(inputs.activations, context)
    errors: dict[str, Tensor] = {}
    for digest in inputs.errors:
        errors |= load(context.store.get_bytes(digest))
    outputs = {}
    for choice in params.units:
        state = mix_unit(choice, weights[choice.unit], activations[choice.unit], errors)
        outputs[per_unit(STATE, choice.unit)] = context.store.put_bytes(state.to_bytes())
    return TaskOutput(outputs)


def _by_unit(digests: tuple[str, ...], context: TaskContext) -> defaultdict[str, list[UnitState]]:
    """Read states, by the unit that they are of."""
    found: defaultdict[str, list[UnitState]] = defaultdict(list)
    for state in read_states(digests, context):
        found[state.formats.unit].append(state)
    return found
