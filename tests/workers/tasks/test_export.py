"""The export task: plain float16 weights by default, on the grids that the codes stand for; and its names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file

from quant_core import load_quantized
from quant_core.nn.layers import QuantLayer
from quant_spec.enums import ExportFormat
from quant_spec.tasks import export
from workers.storage.manifest import pull_tree
from workers.storage.store import NodeStore

RunTask = Callable[..., Any]


def test_export_writes_the_weights_that_the_codes_stand_for(
    run_task: RunTask, task_store: NodeStore, packed_digits: str, tmp_path: Path
) -> None:
    output = run_task("export", {}, {"artifact": [packed_digits]})
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    pull_tree(task_store, output.outputs["model"], plain)
    pull_tree(task_store, packed_digits, packed)
    assert "quantization_config" not in json.loads((plain / "config.json").read_text())
    assert (plain / "scheduler" / "scheduler_config.json").is_file()
    assert {tensor.dtype for tensor in load_file(plain / "diffusion_pytorch_model.safetensors").values()} == {
        torch.float16
    }
    model = UNet2DModel.from_pretrained(plain, torch_dtype=torch.float16)
    quantized = load_quantized(packed, backend="reference")
    layers = {name: layer for name, layer in quantized.named_modules() if isinstance(layer, QuantLayer)}
    assert layers
    for name, layer in layers.items():
        own = model.get_submodule(name)
        assert type(own) is layer.kind
        assert torch.equal(own.weight, layer.weight.half()), name


def test_export_is_deterministic(run_task: RunTask, packed_digits: str) -> None:
    first, second = (run_task("export", {}, {"artifact": [packed_digits]}) for _ in range(2))
    assert first.outputs == second.outputs


def test_the_default_has_the_name_that_it_had_before_there_were_formats() -> None:
    assert export.Params().to_json() == {}
    others = [export.Params(format=form).to_json() for form in ExportFormat if form is not ExportFormat.DEQUANTIZED]
    assert others == [
        {"format": "gguf"},
        {"format": "comfy-gguf"},
        {"format": "comfy-int8"},
        {"format": "modelopt-fp8"},
    ]
