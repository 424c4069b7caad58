"""Reference: what the full-precision model samples for a shard of seeds; shared by every recipe with this sampler.

params
    sampler: see `SamplerSpec`; seeds: {"first", "count"}; batch_size: seeds per denoiser call; sqnr_seeds: how many of
    the first seeds have their trajectory recorded
inputs
    model: tree
outputs
    reference: a shard with `sample`, `conditioning.*` and, if sqnr_seeds > 0, `x` and `prediction`
"""

from __future__ import annotations

from quant_core.diffusion.calibration import RecordSpec
from quant_core.diffusion.sampler import SamplerSpec
from quant_core.metrics.evaluation import record_reference
from workers.execution.context import Inputs, Params, TaskContext, TaskOutput
from workers.tasks.common import fetch_model, seed_range


def run(params: Params, inputs: Inputs, context: TaskContext) -> TaskOutput:
    """Sample one shard in full precision."""
    spec = RecordSpec(
        SamplerSpec.from_json(params["sampler"]), batch_size=params["batch_size"], recorded_seeds=params["sqnr_seeds"]
    )
    path = context.scratch / "reference.safetensors"
    record_reference(fetch_model(inputs, context), seed_range(params["seeds"]), spec, path, device=context.device)
    return TaskOutput({"reference": context.store.put_file(path)})
