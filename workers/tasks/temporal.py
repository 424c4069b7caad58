"""Temporal: quantize the temporal information block, over the sampler's finite set of timesteps.

The format of a state is that of `quant_core.fit.unit_state`. Metrics: `rows`, `features`, `table_bytes`,
`replaced_bytes`, `unserved`, see `quant_core.methods.tfmq.temporal_block.TemporalReport`.
"""

from __future__ import annotations

from dataclasses import asdict

from quant_core.fit.rounding import read_unit
from quant_core.methods.tfmq.temporal_block import fit
from quant_spec.tasks.temporal import STATE, Inputs, Params
from workers.execution.context import TaskContext, TaskOutput
from workers.tasks.inputs import fetch_model, open_trajectories


def run(params: Params, inputs: Inputs[str], context: TaskContext) -> TaskOutput:
    """Quantize the temporal information block."""
    model = fetch_model(inputs.model, context).model.to(context.device)
    formats, ranges = read_unit(params.planned)
    state, report = fit(model, open_trajectories(inputs.calibration, context), formats, ranges, params)
    return TaskOutput({STATE: context.store.put_bytes(state.to_bytes())}, asdict(report))
