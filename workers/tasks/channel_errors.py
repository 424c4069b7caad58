"""Channel errors: what the bits of output channels do, for the layers of a group of units.

The format of the errors is that of `quant_core.methods.mpqdm.layer_errors`. Metrics: `effects`, {layer: error power
at the prediction per error power at its output}.
"""

from __future__ import annotations

from quant_core.fit.rounding import read_unit
from quant_core.methods.mpqdm.channel_errors import measure_units
from quant_core.methods.mpqdm.layer_errors import to_bytes
from quant_spec.tasks.channel_errors import ERRORS, Inputs, Params
from workers.execution.context import TaskContext, TaskOutput
from workers.tasks.inputs import fetch_model, open_trajectories, read_channel_scaling


def run(params: Params, inputs: Inputs[str], context: TaskContext) -> TaskOutput:
    """Measure one group of units."""
    model = fetch_model(inputs.model, context).model.to(context.device)
    calibration = open_trajectories(inputs.calibration, context)
    units = [read_unit(unit) for unit in params.units]
    scaling = read_channel_scaling(inputs.factors, context)
    found = measure_units(model, calibration, units, params.layers, params, scaling)
    effects = {name: float(f"{layer.effect:.4g}") for name, layer in found.items()}
    return TaskOutput({ERRORS: context.store.put_bytes(to_bytes(found))}, {"effects": effects})
