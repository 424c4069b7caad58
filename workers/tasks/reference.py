"""Reference: what the full-precision model samples for a shard of seeds; shared by every recipe with this sampler.

The reference is a shard with `sample`, `conditioning.*` and, if trajectories are recorded, `x` and `prediction`; see
`quant_core.diffusion.calibration`.
"""

from __future__ import annotations

from quant_core.diffusion.calibration import RecordSpec
from quant_core.metrics.evaluation import record_reference
from quant_spec.tasks.reference import REFERENCE, Inputs, Params
from workers.execution.context import TaskContext, TaskOutput
from workers.tasks.inputs import fetch_model, place_model


def run(params: Params, inputs: Inputs[str], context: TaskContext) -> TaskOutput:
    """Sample one shard in full precision."""
    spec = RecordSpec(params.sampler, batch_size=params.batch_size, recorded_seeds=params.sqnr_seeds)
    path = context.scratch / "reference.safetensors"
    denoiser, device = place_model(fetch_model(inputs.model, context), context)
    record_reference(denoiser, params.seeds.range, spec, path, device=device)
    return TaskOutput({REFERENCE: context.store.put_file(path)})
