"""Calibrate: record the exact denoiser inputs along the trajectories of a shard of seeds.

params
    sampler: see `SamplerSpec`; seeds: {"first", "count"}; batch_size: seeds per denoiser call; steps: how many of the
    trajectory's steps, null for all
inputs
    model: tree
outputs
    calibration: a shard, see `quant_core.diffusion.calibration`
"""

from __future__ import annotations

from quant_core.diffusion.calibration import RecordSpec, record_trajectories
from quant_core.diffusion.sampler import SamplerSpec
from workers.execution.context import Inputs, Params, TaskContext, TaskOutput
from workers.tasks.common import fetch_model, seed_range


def run(params: Params, inputs: Inputs, context: TaskContext) -> TaskOutput:
    """Record one shard."""
    spec = RecordSpec(
        SamplerSpec.from_json(params["sampler"]), steps=params.get("steps"), batch_size=params["batch_size"]
    )
    path = context.scratch / "calibration.safetensors"
    record_trajectories(fetch_model(inputs, context), seed_range(params["seeds"]), spec, path, device=context.device)
    return TaskOutput({"calibration": context.store.put_file(path)})
