"""Export: the weights that a release's codes stand for, as a plain float16 model that any diffusers loads.

params
    none
inputs
    artifact: the release's tree
outputs
    model: a tree like the release's, with float16 weights and without quantization: config.json, safetensors and the
    scheduler
metrics
    none

Activations are not quantized in it, so its samples are not those that the release was measured by, and the release's
card does not describe it.
"""

from __future__ import annotations

import json

import torch
from safetensors.torch import save_file
from torch import Tensor

from quant_core.artifact import CONFIG_FILE, SCHEDULER_FILE, WEIGHTS_FILE
from quant_core.layers import QuantLayer
from quant_core.loader import load_folder
from workers.context import Inputs, Params, TaskContext, TaskOutput
from workers.manifest import link_tree, put_tree


def run(params: Params, inputs: Inputs, context: TaskContext) -> TaskOutput:
    """Write the dequantized model."""
    packed, plain = context.scratch / "packed", context.scratch / "plain"
    link_tree(context.store, inputs["artifact"][0], packed)
    plain.mkdir()
    config = json.loads((packed / CONFIG_FILE).read_text(encoding="utf-8"))
    del config["quantization_config"]
    (plain / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_file(dequantized_state(load_folder(packed)), plain / WEIGHTS_FILE, metadata={"format": "pt"})
    if (packed / SCHEDULER_FILE).is_file():
        (plain / SCHEDULER_FILE).parent.mkdir()
        (plain / SCHEDULER_FILE).write_bytes((packed / SCHEDULER_FILE).read_bytes())
    return TaskOutput({"model": put_tree(context.store, plain)})


def dequantized_state(model: torch.nn.Module) -> dict[str, Tensor]:
    """Return the state dict of the model before it was quantized, its weights those that the codes stand for.

    Floating-point tensors are float16; everything else keeps its dtype.
    """
    state = dict(model.state_dict())
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLayer):
            for key in layer.state_dict():
                del state[f"{name}.{key}"]
            state[f"{name}.weight"] = layer.weight
            if layer.bias is not None:
                state[f"{name}.bias"] = layer.bias
    return {name: _half(tensor) for name, tensor in sorted(state.items()) if ".attention_quantizer." not in name}


def _half(tensor: Tensor) -> Tensor:
    return (tensor.half() if tensor.is_floating_point() else tensor).detach().contiguous().clone()
