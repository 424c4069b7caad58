"""Score: the figures of a packed model over all its evaluation shards, and pictures to look at.

params
    sampler, seeds {"first", "count"}, sqnr_seeds: the protocol, repeated in the figures; extractor:
    "efficientnet-lite0" or "inception-v3"; grid: how many seeds are shown
inputs
    packed, model: trees; references, evaluations: shards, in the order of their seeds; extractor_weights: one file, for
    inception-v3
outputs
    score: JSON, DESIGN's `metrics`; grid: PNG with rows full precision, quantized, difference x 4, a column per seed;
    samples: safetensors with the same images, `reference` and `quantized` (k, 3, H, W) float32 in [-1, 1]
metrics
    metrics: as in `score`
"""

from __future__ import annotations

import io
import json
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save

from quant_core.artifact.folder import CONFIG_FILE, parse_quantization_config
from quant_core.diffusion.denoiser import Denoiser, has_signals
from quant_core.inspect.inspection import inspect_model
from quant_core.metrics.cost import model_cost
from quant_core.metrics.evaluation import Quality, summarize
from quant_core.metrics.frechet import ResizedFeatures, efficientnet_lite0, inception_v3
from quant_core.metrics.images import difference, grid
from workers.errors import TaskError
from workers.execution.context import Inputs, Params, TaskContext, TaskOutput
from workers.storage.manifest import read_manifest
from workers.tasks.common import fetch_model, local_files, only, to_json

_GRID_PIXELS = 64  # smaller samples are enlarged to about this


def run(params: Params, inputs: Inputs, context: TaskContext) -> TaskOutput:
    """Sum up a release's quality and cost."""
    references, evaluations = inputs["references"], inputs["evaluations"]
    if not references or len(references) != len(evaluations):
        raise TaskError(f"shards: got {len(references)} references, {len(evaluations)} evaluations, wanted pairs")
    original = fetch_model(inputs, context)
    quality = summarize(
        local_files(references, context),
        local_files(evaluations, context),
        _extractor(params["extractor"], inputs, context),
        params["grid"],
        are_signals=has_signals(original.model),
    )
    protocol = {name: params[name] for name in ("sampler", "seeds", "sqnr_seeds")}
    metrics = quality.metrics | _costs(original, inputs, context) | protocol
    images = {"reference": quality.reference_rgb.contiguous(), "quantized": quality.quantized_rgb.contiguous()}
    outputs = {
        "score": context.store.put_bytes(to_json(metrics)),
        "grid": context.store.put_bytes(_grid_png(quality)),
        "samples": context.store.put_bytes(save(images)),
    }
    return TaskOutput(outputs, {"metrics": metrics})


def _extractor(name: str, inputs: Inputs, context: TaskContext) -> ResizedFeatures:
    """Build the feature extractor that the recipe names."""
    if name == "efficientnet-lite0":
        return efficientnet_lite0()
    if name == "inception-v3":
        return inception_v3(local_files([only(inputs, "extractor_weights")], context)[0])
    raise TaskError(f"extractor: got {name!r}, wanted efficientnet-lite0 or inception-v3")


def _costs(original: Denoiser, inputs: Inputs, context: TaskContext) -> dict[str, Any]:
    """Return bits, bit operations and bytes of the packed model."""
    files = read_manifest(context.store, only(inputs, "packed"))["files"]
    config = json.loads(context.store.get_bytes(files[CONFIG_FILE]["sha256"]))
    inspection = inspect_model(original)
    cost = model_cost(inspection, parse_quantization_config(config["quantization_config"]))
    per_step = {"bops_per_step": list(cost.bops_per_step)} if cost.bops_per_step else {}
    return {
        **per_step,
        "weight_bits_mean": round(cost.weight_bits_mean, 6),
        "act_bits_mean": round(cost.act_bits_mean, 6),
        "bops": cost.bops,
        "bops_fp32": cost.bops_fp32,
        "bytes": sum(entry["bytes"] for path, entry in files.items() if path.endswith(".safetensors")),
        "bytes_fp16": 2 * inspection["parameters"],
    }


def _grid_png(quality: Quality) -> bytes:
    """Draw one row for full precision, one for quantized, one for their difference."""
    reference, quantized = quality.reference_rgb, quality.quantized_rgb
    rows = torch.cat([reference, quantized, difference(reference, quantized)])
    zoom = max(1, _GRID_PIXELS // reference.shape[-1])
    buffer = io.BytesIO()
    Image.fromarray(grid(rows, columns=len(reference), zoom=zoom).numpy()).save(buffer, format="PNG")
    return buffer.getvalue()
