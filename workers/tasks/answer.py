"""Answer: choose the codes of all rounded units again, for what the quantized layers before each give.

The format of a state is that of `quant_core.fit.unit_state`. Metrics: `layers`, {layer: {"sqnr_db": that rounding
leaves at its output}}.
"""

from __future__ import annotations

from quant_core.fit.answering import answer
from quant_spec.task import per_unit
from quant_spec.tasks.answer import STATE, Inputs, Params
from workers.execution.context import TaskContext, TaskOutput
from workers.tasks.inputs import fetch_model, open_trajectories, read_states


def run(params: Params, inputs: Inputs[str], context: TaskContext) -> TaskOutput:
    """Choose codes that answer for the layers before."""
    model = fetch_model(inputs.model, context, streamed=None).model.to(context.device)
    calibration = open_trajectories(inputs.calibration, context)
    made = answer(model, calibration, read_states(inputs.states, context), params)
    outputs = {per_unit(STATE, each.formats.unit): context.store.put_bytes(each.to_bytes()) for each in made.states}
    return TaskOutput(outputs, {"layers": {name: {"sqnr_db": round(db, 4)} for name, db in made.layer_sqnr_db.items()}})
