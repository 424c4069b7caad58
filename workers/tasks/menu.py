"""Menu: round a group of units once at each width.

The format of a state is that of `quant_core.fit.unit_state`; errors are safetensors, "layer:bits" to the error power of
each output channel. Metrics: `layers`, {layer: {bits: signal-to-noise ratio in dB at its output}}.
"""

from __future__ import annotations

from typing import Any

from safetensors.torch import save

from quant_core.fit.menu import round_menu
from quant_core.fit.rounding import read_unit
from quant_spec.task import per_unit
from quant_spec.tasks.menu import ACTIVATIONS, ERRORS, WEIGHTS, Inputs, Params, menu_output
from workers.execution.context import TaskContext, TaskOutput
from workers.tasks.inputs import fetch_model, open_trajectories, read_channel_scaling


def run(params: Params, inputs: Inputs[str], context: TaskContext) -> TaskOutput:
    """Round one group of units."""
    model = fetch_model(inputs.model, context, streamed=None).model.to(context.device)
    calibration = open_trajectories(inputs.calibration, context)
    scaling = read_channel_scaling(inputs.factors, context)
    units = [read_unit(unit) for unit in params.units]
    outputs: dict[str, str] = {}
    layers: dict[str, Any] = {}
    for made in round_menu(model, calibration, units, params, scaling.scales, scaling.shifts):
        for kind, states in ((WEIGHTS, made.weights), (ACTIVATIONS, made.activations)):
            for width, state in states.items():
                outputs[menu_output(kind, width, made.unit)] = context.store.put_bytes(state.to_bytes())
        outputs[per_unit(ERRORS, made.unit)] = context.store.put_bytes(save(made.errors))
        layers |= {
            name: {str(bits): round(db, 4) for bits, db in widths.items()}
            for name, widths in made.layer_sqnr_db.items()
        }
    return TaskOutput(outputs, {"layers": layers})
