"""Export: a release as other tools load it, float16 or in the blocks or numbers of another format.

The model is a tree like the release's: config.json, the weights and the scheduler; and, in folders of their names, the
text encoders of a pipeline that are packed, in plain float16. Weights are

    dequantized     safetensors, the float16 weights that the codes stand for, without quantization
    gguf            a GGUF file, the codes of Linear layers in blocks (`quant_core.artifact.gguf_file`)
    comfy-gguf      the same in the names of the authors' checkpoints (`quant_core.artifact.original_names`)
    comfy-int8      safetensors, codes of 8 bits and scales in these names (`quant_core.artifact.comfy_int8`)
    modelopt-fp8    safetensors, E4M3 numbers with scales of weights and inputs (`quant_core.artifact.modelopt`)

Activations are quantized as the release has them in the last alone, so samples of the others are not those that it was
measured by, and the release's card does not describe them. Metrics:

types: of GGUF files, how many tensors have which of its types
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from quant_core.artifact.comfy_int8 import comfy_int8
from quant_core.artifact.dequantize import dequantized_state
from quant_core.artifact.folder import CONFIG_FILE, SCHEDULER_FILE, WEIGHTS_FILE, packed_home
from quant_core.artifact.gguf_file import GGUF_FILE, write_gguf
from quant_core.artifact.modelopt import modelopt_fp8
from quant_core.artifact.text_encoder import packed_text_encoders, write_dequantized
from quant_core.runtime.loader import load_folder
from quant_spec.documents import read_json_file
from quant_spec.enums import ExportFormat
from quant_spec.tasks.export import MODEL, Inputs, Params
from workers.execution.context import TaskContext, TaskOutput
from workers.storage.manifest import link_tree, put_tree

#: What stays in its dtype: numbers of E4M3, and scales, which float16 would round.
_SCALES = (".weight_scale", ".input_scale")


def run(params: Params, inputs: Inputs[str], context: TaskContext) -> TaskOutput:
    """Write the model in the format that is asked for."""
    packed, plain = context.scratch / "packed", context.scratch / "plain"
    link_tree(context.store, inputs.artifact, packed)
    root, packed = packed, packed_home(packed)
    plain.mkdir()
    config = read_json_file(packed / CONFIG_FILE)
    del config["quantization_config"]
    model = load_folder(packed)
    metrics: dict[str, Any] = {}
    if params.format in (ExportFormat.GGUF, ExportFormat.COMFY_GGUF):
        original = params.format is ExportFormat.COMFY_GGUF
        metrics["types"] = write_gguf(model, config, plain / GGUF_FILE, artifact=inputs.artifact, original=original)
    elif params.format is ExportFormat.COMFY_INT8:
        _save(comfy_int8(model, config), plain)
    elif params.format is ExportFormat.MODELOPT_FP8:
        state, config["quantization_config"] = modelopt_fp8(model)
        _save(state, plain)
    else:
        _save(dequantized_state(model), plain)
    (plain / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for folder in packed_text_encoders(root):
        write_dequantized(folder, plain / folder.name)
    if (root / SCHEDULER_FILE).is_file():
        (plain / SCHEDULER_FILE).parent.mkdir()
        (plain / SCHEDULER_FILE).write_bytes((root / SCHEDULER_FILE).read_bytes())
    return TaskOutput({MODEL: put_tree(context.store, plain)}, metrics)


def _save(state: dict[str, Tensor], folder: Path) -> None:
    """Write a model's tensors, floats that are no scales in float16."""
    tensors = {name: tensor if name.endswith(_SCALES) else _half(tensor) for name, tensor in sorted(state.items())}
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def _half(tensor: Tensor) -> Tensor:
    is_wide = tensor.is_floating_point() and tensor.dtype is not torch.float8_e4m3fn
    return (tensor.half() if is_wide else tensor).contiguous()
