"""Noise: moments of what quantization adds to the predictions, on a shard of full-precision trajectories.

The format is that of `quant_core.methods.ptqd.correction.NoiseMoments`.
"""

from __future__ import annotations

from quant_core import load_quantized
from quant_core.methods.ptqd.noise import measure_noise
from quant_spec.enums import KernelBackend
from quant_spec.keys import canonical_json
from quant_spec.tasks.noise import NOISE, Inputs, Params
from workers.execution.context import TaskContext, TaskOutput
from workers.tasks.inputs import fetch_packed, scheduler_config


def run(params: Params, inputs: Inputs[str], context: TaskContext) -> TaskOutput:
    """Measure one shard."""
    folder = fetch_packed(inputs.packed, context)
    moments = measure_noise(
        load_quantized(folder, device=context.device, backend=KernelBackend.REFERENCE),
        scheduler_config(folder),
        params.sampler,
        context.store.local_path(inputs.reference),
        batch_size=params.batch_size,
    )
    return TaskOutput({NOISE: context.store.put_bytes(canonical_json(moments.to_json()).encode())})
