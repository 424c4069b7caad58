"""Distill: tune all units of a quantized model together, on full-precision trajectories.

The format of a state is that of `quant_core.fit.unit_state`. Metrics: `loss_before`, `loss_after`, |eps_q - eps|^2 per
sample, summed over its elements, on samples of the trajectories, each weighted as its step is; `is_taken`, whether the
states are what was learned, or the start's, if that was not better.

The task saves a checkpoint now and then, and an attempt that finds one goes on from there, with the same result.
"""

from __future__ import annotations

from quant_core.fit.step_gains import StepGains
from quant_core.methods.mpqdm.distillation import Distillation
from quant_spec.task import per_unit
from quant_spec.tasks.distill import STATE, Inputs, Params
from workers.execution.context import TaskContext, TaskOutput
from workers.tasks.inputs import fetch_model, open_trajectories, read_states


def run(params: Params, inputs: Inputs[str], context: TaskContext) -> TaskOutput:
    """Distil one model."""
    teacher, model = (
        fetch_model(inputs.model, context, name).model.to(context.device) for name in ("teacher", "model")
    )
    trajectories = open_trajectories(inputs.trajectories, context)
    gains = None if inputs.gains is None else StepGains.from_bytes(context.store.get_bytes(inputs.gains)).gains
    made = Distillation(teacher, model, read_states(inputs.states, context), trajectories, params, gains)
    notes = context.notes
    saved = None if notes is None else notes.load_checkpoint()
    if saved is not None:
        made.restore(saved)
    while made.iteration < params.iterations:
        if notes is not None:
            notes.report(made.iteration, params.iterations)
        made.step()
        if notes is not None:
            notes.offer_checkpoint(made.checkpoint)
    result = made.finish()
    outputs = {per_unit(STATE, each.formats.unit): context.store.put_bytes(each.to_bytes()) for each in result.states}
    losses = {"loss_before": round(result.loss_before, 4), "loss_after": round(result.loss_after, 4)}
    return TaskOutput(outputs, losses | {"is_taken": result.is_taken})
