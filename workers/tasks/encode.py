"""Encode: what a pipeline's text encoders make of prompts, once for all tasks that sample.

The format is that of `quant_core.diffusion.embeddings`. The denoiser is there without its weights.
"""

from __future__ import annotations

from quant_core.diffusion.denoiser import empty_denoiser
from quant_core.diffusion.embeddings import encode
from quant_core.diffusion.pipeline import load_pipeline, place_pipeline
from quant_core.diffusion.sampler import make_scheduler
from quant_spec.prompts import read_prompts, select_part
from quant_spec.tasks.encode import EMBEDDINGS, Inputs, Params
from workers.execution.context import TaskContext, TaskOutput
from workers.storage.manifest import link_tree


def run(params: Params, inputs: Inputs[str], context: TaskContext) -> TaskOutput:
    """Encode one part of a prompts file."""
    folder, path = context.scratch / "model", context.scratch / "embeddings.safetensors"
    link_tree(context.store, inputs.model, folder)
    denoiser = empty_denoiser(folder)
    pipeline = load_pipeline(folder, denoiser.model, make_scheduler(params.sampler, denoiser.scheduler_config))
    place_pipeline(pipeline, context.device)
    prompts = read_prompts(context.store.get_bytes(inputs.prompts), f"prompts {inputs.prompts[:12]}")
    lines = select_part(prompts, params.part)
    encode(pipeline, params.sampler, lines, params.seeds.range, path)
    return TaskOutput({EMBEDDINGS: context.store.put_file(path)})
