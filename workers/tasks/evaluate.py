"""Evaluate: sample a shard of seeds with the packed model, loaded from its files as a user loads it.

The evaluation is safetensors with `sample`, `psnr_db` of each seed and, where the reference has a trajectory, `power`
of each step; see `quant_core.metrics.evaluation`. A whole pipeline samples with the packed model in the place of its
own, and its samples are pixels. Metrics: `psnr_db`, the mean of the shard's `n` seeds.
"""

from __future__ import annotations

from dataclasses import replace

from safetensors.torch import load_file

from quant_core import load_quantized
from quant_core.metrics.evaluation import evaluate_pipeline, evaluate_shard
from quant_spec.enums import KernelBackend
from quant_spec.tasks.evaluate import EVALUATION, Inputs, Params
from workers.execution.context import TaskContext, TaskOutput
from workers.tasks.inputs import fetch_model, fetch_packed, find_trajectories, scheduler_config


def run(params: Params, inputs: Inputs[str], context: TaskContext) -> TaskOutput:
    """Sample one shard with the packed model and compare it with its reference."""
    folder = fetch_packed(inputs.packed, context)
    path = context.scratch / "evaluation.safetensors"
    reference = context.store.local_path(inputs.reference)
    model = load_quantized(folder, device=context.device, backend=KernelBackend.REFERENCE)
    if inputs.model is None:
        evaluate_shard(
            model,
            scheduler_config(folder),
            params.sampler,
            params.seeds.range,
            reference,
            path,
            batch_size=params.batch_size,
            space=params.samples,
        )
    else:
        whole = replace(
            fetch_model(inputs.model, context, streamed=None), model=model, scheduler_config=scheduler_config(folder)
        )
        trajectories = find_trajectories(whole, params.sampler, inputs, params.part, context)
        evaluate_pipeline(trajectories, model, params.seeds.range, reference, path, batch_size=params.batch_size)
    values = load_file(path)["psnr_db"]
    metrics = {"psnr_db": round(float(values.mean()), 6), "n": len(values)}
    return TaskOutput({EVALUATION: context.store.put_file(path)}, metrics)
