"""Exceptions: leave in full precision what trials say costs most, within a budget, or choose the bits of inputs.

The format of a state is that of `quant_core.fit.unit_state`. Metrics: `operands` and `layers`, names of what stays in
full precision; `multiplications`, the share whose operands do; `added_bytes`; `damage` and `damage_left`, sums of the
mean square errors of the final samples before and after. Where bits of inputs are chosen: `bits`, {layer: mean over the
steps}; `bits_by_step`, their means over multiplications at each step.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from quant_core.artifact.size import kept_bytes, layer_bytes, offset_digits
from quant_core.fit.exceptions import without_parts
from quant_core.fit.input_widths import measure_steps, with_widths
from quant_core.fit.step_gains import StepGains
from quant_core.fit.trials import Damages, merge_damages
from quant_core.fit.unit_state import UnitState
from quant_core.search.exceptions import Kept, Limits, Part, choose_exceptions, left_damage
from quant_core.search.input_widths import Widths, choose_widths
from quant_spec.errors import InvalidInputError
from quant_spec.numbers import significant
from quant_spec.task import per_unit
from quant_spec.tasks.exceptions import STATE, Inputs, Params
from workers.execution.context import TaskContext, TaskOutput
from workers.tasks.inputs import fetch_model, open_trajectories, read_states


def run(params: Params, inputs: Inputs[str], context: TaskContext) -> TaskOutput:
    """Choose, and leave the states with less in them, or with other bits of inputs."""
    model = fetch_model(inputs.model, context, streamed=None).model
    states = read_states(inputs.states, context)
    damages = merge_damages([Damages.from_bytes(context.store.get_bytes(digest)) for digest in inputs.damages])
    if params.choices:
        return _with_chosen_bits(params, inputs, context, model, states, damages)
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


def _with_chosen_bits(
    params: Params,
    inputs: Inputs[str],
    context: TaskContext,
    model: nn.Module,
    states: list[UnitState],
    damages: Damages,
) -> TaskOutput:
    """Choose the bits of inputs at each step, and leave the states with them."""
    if inputs.gains is None:
        raise InvalidInputError("exceptions: got no gains of steps, wanted them, as bits of inputs are chosen")
    gains = StepGains.from_bytes(context.store.get_bytes(inputs.gains)).gains
    calibration = open_trajectories(inputs.calibration, context)
    model.to(context.device)
    specs = {name: spec.activation for state in states for name, spec in state.formats.layers.items()}
    own = {name: spec.bits for name, spec in specs.items() if spec is not None and name in params.ranges}
    by_step = measure_steps(model, calibration, states, list(own))
    widths = choose_widths(own, params.choices, params.macs, damages.inputs, by_step, gains)
    made = with_widths(
        model,
        calibration,
        states,
        widths,
        params.ranges,
        batch_size=params.forward_batch_size,
        seed=params.seed,
    )
    outputs = {per_unit(STATE, s.formats.unit): context.store.put_bytes(s.to_bytes()) for s in made}
    return TaskOutput(outputs, _told(widths, params))


def _told(widths: Widths, params: Params) -> dict[str, Any]:
    """Return the metrics of chosen bits."""
    total = max(sum(params.macs[name] for name in widths), 1)
    steps = range(max(map(len, widths.values()), default=0))
    means = [sum(own[step] * params.macs[name] for name, own in widths.items()) / total for step in steps]
    return {
        "bits": {name: round(sum(own) / len(own), 4) for name, own in widths.items()},
        "bits_by_step": [round(mean, 4) for mean in means],
    }


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
