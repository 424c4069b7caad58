"""Text encoder: round the weights of a pipeline's text encoder to packed codes, weights alone.

The encoder is a tree that transformers loads (`quant_core.artifact.text_encoder`). Metrics: `bytes` of its weights
file; `layers`, {layer: {"sqnr_db": that rounding leaves at its output, or of its weight if rounded to nearest}}.
"""

from __future__ import annotations

from pathlib import Path

from quant_core.artifact.text_encoder import quantize_text_encoder
from quant_core.diffusion.denoiser import empty_denoiser
from quant_core.diffusion.encoder_calls import Call, encoder_calls
from quant_core.diffusion.pipeline import load_pipeline, place_pipeline
from quant_core.diffusion.sampler import make_scheduler
from quant_core.fit.linear_tree import LinearTree
from quant_spec.enums import RoundingMethod
from quant_spec.prompts import PromptPart, line_of, read_prompts, select_part
from quant_spec.tasks.text_encoder import ENCODER, Inputs, Params
from workers.errors import TaskError
from workers.execution.context import TaskContext, TaskOutput
from workers.storage.manifest import link_tree, put_tree


def run(params: Params, inputs: Inputs[str], context: TaskContext) -> TaskOutput:
    """Round one text encoder."""
    if params.layer.activation is not None:
        raise TaskError("text encoder: got a format with quantized activations, wanted activations.bits null")
    source, target = context.scratch / "model", context.scratch / "encoder"
    link_tree(context.store, inputs.model, source)
    config = LinearTree(params.layer.weight, params.layer.weight_range, params, params.seed)
    calls = _calls(source, params, inputs.prompts, context) if params.method is RoundingMethod.CLOSED_FORM else []
    made = quantize_text_encoder(source / params.component, calls, config, target, device=context.device)
    layers = {name: {"sqnr_db": round(db, 4)} for name, db in made.layers.items()}
    return TaskOutput({ENCODER: put_tree(context.store, target)}, {"bytes": made.bytes, "layers": layers})


def _calls(folder: Path, params: Params, prompts: str, context: TaskContext) -> list[Call]:
    """Return what the pipeline calls the encoder with for the prompts of the first calibration seeds."""
    denoiser = empty_denoiser(folder)
    pipeline = load_pipeline(folder, denoiser.model, make_scheduler(params.sampler, denoiser.scheduler_config))
    place_pipeline(pipeline, context.device)
    lines = select_part(
        read_prompts(context.store.get_bytes(prompts), f"prompts {prompts[:12]}"), PromptPart.CALIBRATION
    )
    told = [line_of(lines, seed) for seed in params.seeds.range[: params.samples]]
    return encoder_calls(pipeline, params.component, params.sampler, told, batch_size=params.forward_batch_size)
