"""Distill: tune all units of a quantized model together, on full-precision trajectories.

params
    units: names, in the order of `states`; seed; the distill pass: iterations, batch_size, rank, lr, ..., relations,
    and with them relation_weight, positions
inputs
    model: tree; trajectories: reference shards with predictions; states: one for each unit
outputs
    state:<unit> for each unit, see `quant_core.fit.unit_state`
metrics
    loss_before, loss_after: |eps_q - eps|^2 per sample, summed over its elements, on samples of the trajectories
    is_taken: whether the states are what was learned; the start's if that was not better

The task saves a checkpoint now and then, and an attempt that finds one goes on from there, with the same result.
"""

from __future__ import annotations

from typing import Any

from quant_core.diffusion.calibration import CalibrationSet
from quant_core.fit.unit_state import UnitState
from quant_core.methods.mpqdm.distillation import Distillation, DistillConfig
from workers.execution.context import Inputs, Params, TaskContext, TaskOutput
from workers.tasks.common import fetch_model, local_files

_PASS = (
    "iterations",
    "batch_size",
    "rank",
    "lr",
    "weight_lr",
    "activation_lr",
    "zero_point_lr",
    "bias_lr",
    "positions",
    "seed",
)


def run(params: Params, inputs: Inputs, context: TaskContext) -> TaskOutput:
    """Distil one model."""
    teacher, model = (fetch_model(inputs, context, name).model.to(context.device) for name in ("teacher", "model"))
    states = [UnitState.from_bytes(context.store.get_bytes(digest)) for digest in inputs["states"]]
    trajectories = CalibrationSet(local_files(inputs["trajectories"], context))
    made = Distillation(teacher, model, states, trajectories, _config(params))
    notes = context.notes
    saved = None if notes is None else notes.load_checkpoint()
    if saved is not None:
        made.restore(saved)
    while made.iteration < made.config.iterations:
        if notes is not None:
            notes.report(made.iteration, made.config.iterations)
        made.step()
        if notes is not None:
            notes.offer_checkpoint(made.checkpoint)
    result = made.finish()
    outputs = {f"state:{each.formats.unit}": context.store.put_bytes(each.to_bytes()) for each in result.states}
    losses = {"loss_before": round(result.loss_before, 4), "loss_after": round(result.loss_after, 4)}
    return TaskOutput(outputs, losses | {"is_taken": result.is_taken})


def _config(params: dict[str, Any]) -> DistillConfig:
    chosen = {name: params[name] for name in _PASS if name in params}
    return DistillConfig(relation_weight=params["relation_weight"] if params["relations"] else 0.0, **chosen)
