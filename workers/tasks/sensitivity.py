"""Sensitivity: damage and bytes of each choice for each layer of a group of units.

The format of the table is that of `quant_spec.tasks.sensitivity`. Metrics: `layers`, {layer: {width: damage}}.
"""

from __future__ import annotations

from collections.abc import Sequence

from safetensors.torch import load
from torch import Tensor

from quant_core.artifact.choice_table import Measured, attention_bytes, layer_entries
from quant_core.artifact.size import layer_bytes, offset_digits, rest_bytes, tensor_bytes
from quant_core.fit.sensitivity import PATHS, Choices, choose_rows, fitted_to_units, measure
from quant_core.fit.step_gains import StepGains
from quant_core.fit.unit_state import UnitState
from quant_spec.keys import canonical_json
from quant_spec.tasks.sensitivity import TABLE, Inputs, Params
from workers.execution.context import TaskContext, TaskOutput
from workers.tasks.inputs import fetch_model, open_trajectories, read_states


def run(params: Params, inputs: Inputs[str], context: TaskContext) -> TaskOutput:
    """Measure one group of units."""
    model = fetch_model(inputs.model, context).model.to(context.device)
    calibration = open_trajectories(inputs.calibration, context)
    around = read_states(inputs.context, context)
    choices = Choices(read_states(inputs.weights, context), read_states(inputs.activations, context))
    gains = StepGains.from_bytes(context.store.get_bytes(inputs.gains))
    damage = measure(
        model,
        calibration,
        params.units,
        around,
        choices,
        path=PATHS[params.path],
        rows=choose_rows(gains, calibration.step_index.tolist(), calibration.samples, params.rows, params.step_ranges),
        batch_size=params.forward_batch_size,
    )
    damage = fitted_to_units(damage, around, gains.units)
    errors: dict[str, Tensor] = {}
    for digest in inputs.errors:
        errors |= load(context.store.get_bytes(digest))
    digits = offset_digits(sum(parameter.numel() for parameter in model.parameters()))
    found = Measured(model, choices, damage, errors, digits)
    layers = layer_entries(found, params)
    base = attention_bytes(_one_width(choices.activations), digits)
    if params.counts_rest:
        block = None if inputs.temporal is None else UnitState.from_bytes(context.store.get_bytes(inputs.temporal))
        base += _rest(found, around, block)
    names = {name: state.formats.unit for state in choices.weights for name in state.formats.layers}
    names |= {name: state.formats.unit for state in choices.activations for name in state.formats.attentions}
    table = {"layers": layers, "base_bytes": base, "unit": {name: names[name] for name in params.layers}}
    told = {name: {width: e["damage"] for width, e in entry["weights"].items()} for name, entry in layers.items()}
    return TaskOutput({TABLE: context.store.put_bytes(canonical_json(table).encode())}, {"layers": told})


def _one_width(states: Sequence[UnitState]) -> list[UnitState]:
    """Return the first state of each unit."""
    return list({state.formats.unit: state for state in reversed(states)}.values())


def _rest(found: Measured, context: list[UnitState], block: UnitState | None) -> int:
    """Return the bytes of what no choice changes."""
    quantized = {name for state in context for name in state.formats.layers}
    total = 0
    if block is not None:
        quantized |= {*block.formats.layers, *block.formats.features, *block.formats.unserved}
        specs = block.formats.layers
        for name, spec in specs.items():
            own = {key: t for key, t in block.tensors.items() if key.startswith(f"{name}.")}
            total += layer_bytes(name, spec, own, found.digits)
        others = [k for k in block.tensors if k.rpartition(".")[0] in block.formats.features]
        total += sum(tensor_bytes(key, block.tensors[key], found.digits) for key in others)
    return total + rest_bytes(found.model, quantized, found.digits)
