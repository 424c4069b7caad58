"""Reference: what the full-precision model samples for a shard of seeds; shared by every recipe with this sampler.

The reference is a shard with `sample`, `conditioning.*`, of a decoded pipeline `latent`, and, where trajectories are
recorded, `x` and `prediction`; see `quant_core.diffusion.calibration`.
"""

from __future__ import annotations

from quant_core.diffusion.calibration import RecordSpec, record
from quant_spec.tasks.reference import REFERENCE, Inputs, Params
from workers.execution.context import TaskContext, TaskOutput
from workers.tasks.inputs import fetch_model, find_trajectories, place_model


def run(params: Params, inputs: Inputs[str], context: TaskContext) -> TaskOutput:
    """Sample one shard in full precision."""
    spec = RecordSpec(
        params.sampler,
        batch_size=params.batch_size,
        recorded_seeds=params.sqnr_seeds,
        predictions=True,
        samples=True,
    )
    path = context.scratch / "reference.safetensors"
    denoiser, device = place_model(fetch_model(inputs.model, context, streamed=None), context)
    if device is not None:
        denoiser.model.to(device)
    trajectories = find_trajectories(denoiser, params.sampler, inputs, params.part, context)
    record(trajectories, params.seeds.range, spec, path)
    return TaskOutput({REFERENCE: context.store.put_file(path)})
