"""Layers: the format of each quantized layer of a release, and how it runs on the device at hand.

It has no outputs: how a layer runs depends on this machine, so it is never queued or recorded. Metrics:

device: its name; backend: what the choice comes to; layers: a list in the model's order, each with
    layer: its name; weight, activation, split: as in `quantization_config`
    bytes: size of all its tensors, loaded
    backend, reason: what it runs on, and how or why
"""

from __future__ import annotations

from typing import Any

from kernels.backend import resolve_backend
from quant_core.nn.layers import QuantLayer
from quant_core.runtime.build import build_runtime
from quant_core.runtime.loader import check_device, load_folder
from quant_spec.tasks.layer_table import Inputs, Params
from workers.execution.context import TaskContext, TaskOutput
from workers.storage.manifest import link_tree
from workers.tasks.device import device_name


def run(params: Params, inputs: Inputs[str], context: TaskContext) -> TaskOutput:
    """Load the release for the device and describe it."""
    device = check_device(context.device)
    backend = resolve_backend(params.backend, device)
    folder = context.scratch / "artifact"
    link_tree(context.store, inputs.artifact, folder)
    model = load_folder(folder).to(device)
    formats = {name: _format(module) for name, module in model.named_modules() if isinstance(module, QuantLayer)}
    layers = [
        {"layer": run.layer, **formats[run.layer], "backend": str(run.backend), "reason": run.reason}
        for run in build_runtime(model, backend, params.backend)
    ]
    return TaskOutput({}, {"device": device_name(device), "backend": str(backend), "layers": layers})


def _format(layer: QuantLayer) -> dict[str, Any]:
    """Return how a layer is stored."""
    return layer.spec.to_json() | {"bytes": sum(tensor.numel() * tensor.element_size() for tensor in layer.buffers())}
