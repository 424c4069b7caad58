"""Noise: moments of what quantization adds to the predictions, on a shard of full-precision trajectories.

params
    sampler: see `SamplerSpec`; batch_size: seeds per denoiser call
inputs
    packed: tree; reference: a shard with the trajectory of all its seeds
outputs
    noise: JSON, see `quant_core.methods.ptqd.correction.NoiseMoments`
"""

from __future__ import annotations

from quant_core import load_quantized
from quant_core.diffusion.sampler import SamplerSpec
from quant_core.methods.ptqd.noise import measure_noise
from workers.execution.context import Inputs, Params, TaskContext, TaskOutput
from workers.tasks.common import fetch_packed, local_files, only, scheduler_config, to_json


def run(params: Params, inputs: Inputs, context: TaskContext) -> TaskOutput:
    """Measure one shard."""
    folder = fetch_packed(inputs, context)
    moments = measure_noise(
        load_quantized(folder, device=context.device, backend="reference"),
        scheduler_config(folder),
        SamplerSpec.from_json(params["sampler"]),
        local_files([only(inputs, "reference")], context)[0],
        batch_size=params["batch_size"],
    )
    return TaskOutput({"noise": context.store.put_bytes(to_json(moments.to_json()))})
