"""Evaluate: sample a shard of seeds with the packed model, loaded from its files as a user loads it.

params
    sampler: see `SamplerSpec`; seeds: {"first", "count"}; batch_size: seeds per denoiser call; sqnr_seeds: how many
    seeds of the reference have a trajectory; backend: of the kernels, default "reference"
inputs
    packed: tree; reference: the shard of the same seeds
outputs
    evaluation: safetensors with `sample`, `psnr_db` per seed and `power` per step, see `quant_core.metrics.evaluation`
metrics
    psnr_db: mean of the shard; n
"""

from __future__ import annotations

from safetensors.torch import load_file

from quant_core import load_quantized
from quant_core.diffusion.sampler import SamplerSpec
from quant_core.metrics.evaluation import evaluate_shard
from quant_spec.enums import SampleSpace
from workers.execution.context import Inputs, Params, TaskContext, TaskOutput
from workers.tasks.common import fetch_packed, local_files, only, scheduler_config, seed_range


def run(params: Params, inputs: Inputs, context: TaskContext) -> TaskOutput:
    """Sample one shard with the packed model and compare it with its reference."""
    folder = fetch_packed(inputs, context)
    model = load_quantized(folder, device=context.device, backend=params.get("backend", "reference"))
    path = context.scratch / "evaluation.safetensors"
    evaluate_shard(
        model,
        scheduler_config(folder),
        SamplerSpec.from_json(params["sampler"]),
        seed_range(params["seeds"]),
        local_files([only(inputs, "reference")], context)[0],
        path,
        batch_size=params["batch_size"],
        space=SampleSpace(params["samples"]),
    )
    values = load_file(path)["psnr_db"]
    metrics = {"psnr_db": round(float(values.mean()), 6), "n": len(values)}
    return TaskOutput({"evaluation": context.store.put_file(path)}, metrics)
