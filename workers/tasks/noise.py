"""Noise: moments of what quantization adds to the predictions, on a shard of full-precision trajectories.

The format is that of `quant_core.methods.ptqd.correction.NoiseMoments`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from quant_core import load_quantized
from quant_core.diffusion.trajectories import PipelineTrajectories
from quant_core.methods.ptqd.noise import measure_noise, measure_pipeline_noise
from quant_spec.enums import KernelBackend
from quant_spec.keys import canonical_json
from quant_spec.tasks.noise import NOISE, Inputs, Params
from workers.errors import TaskError
from workers.execution.context import TaskContext, TaskOutput
from workers.tasks.inputs import EncodedHere, fetch_model, fetch_packed, find_trajectories, scheduler_config


def run(params: Params, inputs: Inputs[str], context: TaskContext) -> TaskOutput:
    """Measure one shard."""
    folder = fetch_packed(inputs.packed, context)
    quantized = load_quantized(folder, device=context.device, backend=KernelBackend.REFERENCE)
    if inputs.model is None:
        moments = measure_noise(
            quantized,
            scheduler_config(folder),
            params.sampler,
            _reference(inputs, context),
            batch_size=params.batch_size,
        )
    else:
        whole = replace(fetch_model(inputs.model, context), scheduler_config=scheduler_config(folder))
        whole.model.to(context.device)
        trajectories = find_trajectories(whole, params.sampler, EncodedHere(inputs.prompts), params.part, context)
        if not isinstance(trajectories, PipelineTrajectories) or params.seeds is None:
            raise TaskError("noise: got a model without a pipeline or seeds, wanted both, or a reference")
        moments = measure_pipeline_noise(trajectories, quantized, params.seeds.range, batch_size=params.batch_size)
    return TaskOutput({NOISE: context.store.put_bytes(canonical_json(moments.to_json()).encode())})


def _reference(inputs: Inputs[str], context: TaskContext) -> Path:
    """Return the shard of full-precision trajectories."""
    if inputs.reference is None:
        raise TaskError("noise: got neither a reference nor a model, wanted one of both")
    return context.store.local_path(inputs.reference)
