"""Round: quantize a group of units without gradients.

The format of a state is that of `quant_core.fit.unit_state`. Metrics: `layers`, {layer: {"sqnr_db": of its output, or
of its weight if rounded to nearest}}.
"""

from __future__ import annotations

from safetensors.torch import load
from torch import Tensor

from quant_core.fit.low_rank_branch import branches_from_bytes
from quant_core.fit.rounding import read_unit, round_units
from quant_spec.task import per_unit
from quant_spec.tasks.round import STATE, Inputs, Params
from workers.execution.context import TaskContext, TaskOutput
from workers.tasks.inputs import fetch_model, open_trajectories, read_channel_scaling, read_step_bits


def run(params: Params, inputs: Inputs[str], context: TaskContext) -> TaskOutput:
    """Round one group of units."""
    model = fetch_model(inputs.model, context, streamed=None).model.to(context.device)
    calibration = open_trajectories(inputs.calibration, context)
    bits = read_step_bits(inputs.step_bits, context)
    units = [read_unit(unit, bits) for unit in params.units]
    scaling = read_channel_scaling(inputs.factors, context)
    channels = (scaling.scales, scaling.shifts, _allocation(inputs.allocation, context))
    branches = branches_from_bytes([context.store.get_bytes(digest) for digest in inputs.branches])
    rounded = round_units(model, calibration, units, params, *channels, branches=branches)
    outputs = {
        per_unit(STATE, each.state.formats.unit): context.store.put_bytes(each.state.to_bytes()) for each in rounded
    }
    layers = {name: {"sqnr_db": round(db, 4)} for each in rounded for name, db in each.layer_sqnr_db.items()}
    return TaskOutput(outputs, {"layers": layers})


def _allocation(digest: str | None, context: TaskContext) -> dict[str, Tensor] | None:
    """Read the bits of output channels, if they were chosen."""
    return None if digest is None else load(context.store.get_bytes(digest))
