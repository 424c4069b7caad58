"""Low rank: choose the 16-bit branches of a group of units' layers, and what their input channels are divided by.

The format of branches is that of `quant_core.fit.low_rank_branch`; where smoothing is asked for there are factors too,
as of the task `scale`. Metrics: `layers`, {layer: {"rank", "exponent", "gain_db", "bits", "weighed"}}, see
`quant_core.methods.svdquant.low_rank.BranchReport`.
"""

from __future__ import annotations

from dataclasses import asdict

from quant_core.fit.low_rank_branch import branches_to_bytes
from quant_core.fit.rounding import read_unit
from quant_core.methods.svdquant.low_rank import fit
from quant_spec.task import per_unit
from quant_spec.tasks.low_rank import BRANCHES, FACTORS, Inputs, Params
from workers.execution.context import TaskContext, TaskOutput
from workers.tasks.inputs import fetch_model, open_trajectories, read_channel_scaling, read_step_bits


def run(params: Params, inputs: Inputs[str], context: TaskContext) -> TaskOutput:
    """Choose the branches of one group of units."""
    model = fetch_model(inputs.model, context, streamed=None).model.to(context.device)
    calibration = open_trajectories(inputs.calibration, context)
    units = [read_unit(unit, read_step_bits(inputs.step_bits, context)) for unit in params.units]
    branches, chosen, reports = fit(model, calibration, units, params, read_channel_scaling(inputs.factors, context))
    outputs = {}
    for formats, _ in units:
        own = {name: branches[name] for name in formats.layers if name in branches}
        outputs[per_unit(BRANCHES, formats.unit)] = context.store.put_bytes(branches_to_bytes(own))
        if params.smoothing is not None:
            scaling = chosen.of(list(formats.layers))
            outputs[per_unit(FACTORS, formats.unit)] = context.store.put_bytes(scaling.to_bytes())
    layers = {name: {key: round(value, 4) for key, value in asdict(report).items()} for name, report in reports.items()}
    return TaskOutput(outputs, {"layers": layers})
