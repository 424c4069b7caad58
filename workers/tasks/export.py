"""Export: the weights that a release's codes stand for, as a plain float16 model that any diffusers loads.

The model is a tree like the release's, with float16 weights and without quantization: config.json, safetensors and the
scheduler; and, in folders of their names, the text encoders of a pipeline that are packed. Activations are not
quantized in it, so its samples are not those that the release was measured by, and the release's card does not describe
it.
"""

from __future__ import annotations

import json

from safetensors.torch import save_file
from torch import Tensor

from quant_core.artifact.dequantize import dequantized_state
from quant_core.artifact.folder import CONFIG_FILE, SCHEDULER_FILE, WEIGHTS_FILE, packed_home
from quant_core.artifact.text_encoder import packed_text_encoders, write_dequantized
from quant_core.runtime.loader import load_folder
from quant_spec.documents import read_json_file
from quant_spec.tasks.export import MODEL, Inputs, Params
from workers.execution.context import TaskContext, TaskOutput
from workers.storage.manifest import link_tree, put_tree


def run(params: Params, inputs: Inputs[str], context: TaskContext) -> TaskOutput:
    """Write the dequantized model."""
    packed, plain = context.scratch / "packed", context.scratch / "plain"
    link_tree(context.store, inputs.artifact, packed)
    root, packed = packed, packed_home(packed)
    plain.mkdir()
    config = read_json_file(packed / CONFIG_FILE)
    del config["quantization_config"]
    (plain / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    state = {name: _half(tensor) for name, tensor in sorted(dequantized_state(load_folder(packed)).items())}
    save_file(state, plain / WEIGHTS_FILE, metadata={"format": "pt"})
    for folder in packed_text_encoders(root):
        write_dequantized(folder, plain / folder.name)
    if (root / SCHEDULER_FILE).is_file():
        (plain / SCHEDULER_FILE).parent.mkdir()
        (plain / SCHEDULER_FILE).write_bytes((root / SCHEDULER_FILE).read_bytes())
    return TaskOutput({MODEL: put_tree(context.store, plain)})


def _half(tensor: Tensor) -> Tensor:
    return (tensor.half() if tensor.is_floating_point() else tensor).contiguous()
