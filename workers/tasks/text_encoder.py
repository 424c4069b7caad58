"""Text encoder: round the weights of a transformers model to packed codes, weights alone.

The encoder is a tree that transformers loads (`quant_core.artifact.text_encoder`). Metrics: `bytes` of its weights
file; `layers`, {layer: {"sqnr_db": that rounding leaves at its output, or of its weight if rounded to nearest}}.
"""

from __future__ import annotations

from safetensors.torch import load

from quant_core.artifact.text_encoder import quantize_text_encoder
from quant_core.fit.linear_tree import LinearTree
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
    config = LinearTree(params.layer.weight, params.layer.weight_range, params, params.seed, params.forward_batch_size)
    prompts = load(context.store.get_bytes(inputs.prompts))
    made = quantize_text_encoder(source / params.component, prompts, config, target, device=context.device)
    layers = {name: {"sqnr_db": round(db, 4)} for name, db in made.layers.items()}
    return TaskOutput({ENCODER: put_tree(context.store, target)}, {"bytes": made.bytes, "layers": layers})
