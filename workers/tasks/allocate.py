"""Allocate: choose the bits of the output channels of all layers from their measured errors.

The allocation is safetensors: for each layer the bits of its output channels, uint8. Metrics: `layers`, {layer:
[channels with one bit more, with one less]}; `mean`, bits per weight of these layers.
"""

from __future__ import annotations

from safetensors.torch import save

from quant_core.methods.mpqdm.allocation import allocate
from quant_core.methods.mpqdm.layer_errors import LayerErrors, from_bytes
from quant_spec.tasks.allocate import ALLOCATION, Inputs, Params
from workers.execution.context import TaskContext, TaskOutput


def run(params: Params, inputs: Inputs[str], context: TaskContext) -> TaskOutput:
    """Choose for all layers."""
    layers: dict[str, LayerErrors] = {}
    for digest in inputs.errors:
        layers |= from_bytes(context.store.get_bytes(digest))
    bits = allocate(layers, params)
    moved = {name: [int((bits[name] == layer.bits + step).sum()) for step in (1, -1)] for name, layer in layers.items()}
    weights = sum(layer.channels * layer.columns for layer in layers.values())
    spent = sum(int(bits[name].sum()) * layer.columns for name, layer in layers.items())
    metrics = {"layers": moved, "mean": round(spent / max(weights, 1), 6)}
    return TaskOutput({ALLOCATION: context.store.put_bytes(save(bits))}, metrics)
