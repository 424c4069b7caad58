"""Reconstruct: learn the rounding of one unit.

The format of a state is that of `quant_core.fit.unit_state`. Metrics: `unit`; `sqnr_db_before`, `sqnr_db_after` of the
unit's output, on calibration samples.
"""

from __future__ import annotations

from quant_core.fit.reconstruction import reconstruct_unit
from quant_core.fit.unit_state import UnitState
from quant_spec.tasks.reconstruct import STATE, Inputs, Params
from workers.execution.context import TaskContext, TaskOutput
from workers.tasks.inputs import fetch_model, open_trajectories, read_states


def run(params: Params, inputs: Inputs[str], context: TaskContext) -> TaskOutput:
    """Reconstruct one unit."""
    model = fetch_model(inputs.model, context, streamed=None).model.to(context.device)
    calibration = open_trajectories(inputs.calibration, context)
    start = UnitState.from_bytes(context.store.get_bytes(inputs.state))
    earlier = read_states(inputs.earlier, context)
    temporal = None if inputs.temporal is None else UnitState.from_bytes(context.store.get_bytes(inputs.temporal))
    result = reconstruct_unit(model, calibration, start, earlier, params, context.scratch, temporal)
    metrics = {
        "unit": result.state.formats.unit,
        "sqnr_db_before": round(result.sqnr_db_before, 4),
        "sqnr_db_after": round(result.sqnr_db_after, 4),
    }
    return TaskOutput({STATE: context.store.put_bytes(result.state.to_bytes())}, metrics)
