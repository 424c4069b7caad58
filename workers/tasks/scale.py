"""Scale: choose what the input channels of a group of units' layers are divided by, and their power-of-two steps.

The format of factors is that of `quant_core.fit.channel_scaling`. Metrics: `layers`, {layer: {"gain_db", "least",
"greatest", "shifted"}}, see `quant_core.methods.dmq.scaling.ScaleReport`.
"""

from __future__ import annotations

from dataclasses import asdict

from quant_core.fit.rounding import read_unit
from quant_core.methods.dmq.scaling import fit
from quant_spec.task import per_unit
from quant_spec.tasks.scale import FACTORS, Inputs, Params
from workers.execution.context import TaskContext, TaskOutput
from workers.tasks.inputs import fetch_model, open_trajectories, read_step_bits


def run(params: Params, inputs: Inputs[str], context: TaskContext) -> TaskOutput:
    """Choose the factors of one group of units."""
    model = fetch_model(inputs.model, context, streamed=None).model.to(context.device)
    calibration = open_trajectories(inputs.calibration, context)
    bits = read_step_bits(inputs.step_bits, context)
    units = [read_unit(unit, bits) for unit in params.units]
    scaling, reports = fit(model, calibration, units, params)
    outputs = {
        per_unit(FACTORS, formats.unit): context.store.put_bytes(scaling.of(list(formats.layers)).to_bytes())
        for formats, _ in units
    }
    layers = {name: {key: round(value, 4) for key, value in asdict(report).items()} for name, report in reports.items()}
    return TaskOutput(outputs, {"layers": layers})
