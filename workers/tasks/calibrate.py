"""Calibrate: record the exact denoiser inputs along the trajectories of a shard of seeds.

The format of a shard is that of `quant_core.diffusion.calibration`.
"""

from __future__ import annotations

from quant_core.diffusion.calibration import RecordSpec, record
from quant_spec.tasks.calibrate import CALIBRATION, Inputs, Params
from workers.execution.context import TaskContext, TaskOutput
from workers.tasks.inputs import fetch_model, find_trajectories, place_model


def run(params: Params, inputs: Inputs[str], context: TaskContext) -> TaskOutput:
    """Record one shard."""
    spec = RecordSpec(params.sampler, steps=params.steps, batch_size=params.batch_size)
    path = context.scratch / "calibration.safetensors"
    denoiser, device = place_model(fetch_model(inputs.model, context, streamed=None), context)
    if device is not None:
        denoiser.model.to(device)
    record(
        find_trajectories(denoiser, params.sampler, inputs, params.part, context),
        params.seeds.range,
        spec,
        path,
    )
    return TaskOutput({CALIBRATION: context.store.put_file(path)})
