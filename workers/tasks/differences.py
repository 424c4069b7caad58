"""Differences: let layers of a quantized model read differences between steps, with ranges found in closed loop.

The format of a state is that of `quant_core.fit.unit_state`. Metrics: `layers` in differences, `steps`, at how many
steps they are on average, `state_bytes`, what they remember of a sample between steps.
"""

from __future__ import annotations

from quant_core.fit.step_gains import StepGains
from quant_core.methods.modiff.differences import fit_differences
from quant_spec.task import per_unit
from quant_spec.tasks.differences import STATE, Inputs, Params
from workers.execution.context import TaskContext, TaskOutput
from workers.tasks.inputs import fetch_model, open_trajectories, read_states


def run(params: Params, inputs: Inputs[str], context: TaskContext) -> TaskOutput:
    """Find where differences pay, and their grids."""
    model = fetch_model(inputs.model, context).model.to(context.device)
    found = fit_differences(
        model,
        open_trajectories(inputs.calibration, context),
        read_states(inputs.states, context),
        params,
        None if inputs.gains is None else StepGains.from_bytes(context.store.get_bytes(inputs.gains)),
    )
    outputs = {per_unit(STATE, each.formats.unit): context.store.put_bytes(each.to_bytes()) for each in found.states}
    return TaskOutput(
        outputs, {"layers": found.layers, "steps": round(found.steps, 2), "state_bytes": found.state_bytes}
    )
