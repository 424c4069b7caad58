"""Exceptions: leave in full precision what trials say costs most, within a budget.

The format of a state is that of `quant_core.fit.unit_state`. Metrics: `operands` and `layers`, names of what stays in
full precision; `multiplications`, the share whose operands do; `added_bytes`; `damage` and `damage_left`, sums of the
mean square errors of the final samples before and after.
"""

from __future__ import annotations

from torch import nn

from quant_core.artifact.size import kept_bytes, layer_bytes, offset_digits
from quant_core.fit.exceptions import without_parts
from quant_core.fit.trials import Damages, merge_damages
from quant_core.fit.unit_state import UnitState
from quant_core.search.exceptions import Kept, Limits, Part, choose_exceptions, left_damage
from quant_spec.numbers import significant
from quant_spec.task import per_unit
from quant_spec.tasks.exceptions import STATE, Inputs, Params
from workers.execution.context import TaskContext, TaskOutput
from workers.tasks.inputs import fetch_model, read_states


def run(params: Params, inputs: Inputs[str], context: TaskContext) -> TaskOutput:
    """Choose, and leave the states with less in them."""
    model = fetch_model(inputs.model, context, streamed=None).model
    states = read_states(inputs.states, context)
    damages = merge_damages([Damages.from_bytes(context.store.get_bytes(digest)) for digest in inputs.damages])
    parts, packed = _parts(model, states, params)
    limits = Limits(params.multiplications * params.all_macs, params.bytes * packed)
    chosen = choose_exceptions(parts, damages, limits)
    operands = sorted(name for name, kept in chosen.items() if kept is Kept.OPERANDS)
    layers = sorted(name for name, kept in chosen.items() if kept is Kept.ALL)
    outputs = {}
    for state in states:
        made = without_parts(state, operands=operands, layers=layers)
        outputs[per_unit(STATE, state.formats.unit)] = context.store.put_bytes(made.to_bytes())
    metrics = {
        "operands": operands,
        "layers": layers,
        "multiplications": round(sum(params.macs[name] for name in chosen) / params.all_macs, 6),
        "added_bytes": sum(part.added_bytes or 0 for part in parts if part.name in layers),
        "damage": significant(left_damage(parts, damages, {})),
        "damage_left": significant(left_damage(parts, damages, chosen)),
    }
    return TaskOutput(outputs, metrics)


def _parts(model: nn.Module, states: list[UnitState], params: Params) -> tuple[list[Part], int]:
    """Return what can be an exception, and the bytes of all quantized layers."""
    digits = offset_digits(sum(parameter.numel() for parameter in model.parameters()))
    parts: list[Part] = []
    packed = 0
    for state in states:
        for name, spec in state.formats.layers.items():
            own = layer_bytes(name, spec, state.below(f"{name}."), digits)
            packed += own
            parts.append(Part(name, params.macs[name], kept_bytes(model, name, digits) - own))
        parts += [Part(name, params.macs[name], None) for name in state.formats.attentions]
    return parts, packed
