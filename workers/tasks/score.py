"""Score: the figures of a packed model over all its evaluation shards, and pictures to look at.

The score is JSON, a release's metrics; the grid a PNG with rows full precision, quantized, difference x 4, a column per
seed; the samples safetensors with the same images, `reference` and `quantized` (k, 3, H, W) float32 in [-1, 1].
Metrics: `metrics`, as in the score.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save

from quant_core.artifact.folder import CONFIG_FILE, parse_quantization_config
from quant_core.diffusion.calibration import CalibrationSet
from quant_core.diffusion.denoiser import Denoiser, has_signals
from quant_core.inspect.inspection import inspect_model
from quant_core.metrics.cost import model_cost
from quant_core.metrics.evaluation import Quality, summarize, worst_seeds
from quant_core.metrics.frechet import ResizedFeatures, efficientnet_lite0, inception_v3
from quant_core.metrics.images import difference, grid
from quant_spec.documents import read_json
from quant_spec.enums import Extractor
from quant_spec.keys import canonical_json
from quant_spec.metrics import check_computed
from quant_spec.pipeline import denoiser_entry
from quant_spec.prompts import PromptPart, line_of
from quant_spec.tasks.score import GRID, SAMPLES, SCORE, Inputs, Params
from workers.errors import TaskError
from workers.execution.context import TaskContext, TaskOutput
from workers.storage.manifest import read_files
from workers.tasks.inputs import fetch_model, local_files, read_lines

_GRID_PIXELS = 64  # smaller samples are enlarged to about this


def run(params: Params, inputs: Inputs[str], context: TaskContext) -> TaskOutput:
    """Sum up a release's quality and cost."""
    references, evaluations = inputs.references, inputs.evaluations
    if not references or len(references) != len(evaluations):
        raise TaskError(f"shards: got {len(references)} references, {len(evaluations)} evaluations, wanted pairs")
    original = fetch_model(inputs.model, context, streamed=None)
    quality = summarize(
        local_files(references, context),
        local_files(evaluations, context),
        _extractor(params.extractor, inputs.extractor_weights, context),
        params.grid,
        params.samples,
        are_signals=has_signals(original.model),
        device=context.device,
    )
    protocol = {
        "sampler": params.sampler.to_json(),
        "seeds": params.seeds.to_json(),
        "sqnr_seeds": params.sqnr_seeds,
    }
    metrics = quality.metrics | _costs(original, inputs, context) | protocol
    if params.part is not None:
        metrics |= _prompts(original, params, params.part, inputs, context)
    check_computed(metrics)
    images = {"reference": quality.reference_rgb.contiguous(), "quantized": quality.quantized_rgb.contiguous()}
    outputs = {
        SCORE: context.store.put_bytes(canonical_json(metrics).encode()),
        GRID: context.store.put_bytes(_grid_png(quality)),
        SAMPLES: context.store.put_bytes(save(images)),
    }
    return TaskOutput(outputs, {"metrics": metrics})


def _prompts(
    original: Denoiser, params: Params, part: PromptPart, inputs: Inputs[str], context: TaskContext
) -> dict[str, Any]:
    """Return what the pipeline was told, and the prompts of which came out worst."""
    lines = read_lines(original, inputs.prompts, part, context)
    worst = worst_seeds(local_files(inputs.evaluations, context), params.seeds.first, params.grid)
    return {
        "prompts": {"file": inputs.prompts, "part": part.value, "lines": len(lines)},
        "worst_prompts": [{"prompt": line_of(lines, seed).text, "seed": seed, "psnr_db": psnr} for seed, psnr in worst],
        "shown_prompts": [line_of(lines, params.seeds.first + index).text for index in range(params.grid)],
    }


def _extractor(extractor: Extractor, weights: str | None, context: TaskContext) -> ResizedFeatures:
    """Build the feature extractor that the recipe names."""
    if extractor is Extractor.EFFICIENTNET_LITE0:
        return efficientnet_lite0()
    if weights is None:
        raise TaskError(f"input extractor_weights: got none with {extractor}, wanted its file of weights")
    return inception_v3(context.store.local_path(weights))


def _costs(original: Denoiser, inputs: Inputs[str], context: TaskContext) -> dict[str, Any]:
    """Return bits, bit operations and bytes of the packed model."""
    files = read_files(context.store, inputs.packed)
    config = read_json(context.store.get_bytes(files[CONFIG_FILE][0]), CONFIG_FILE)
    inspection = inspect_model(original, _call(inputs, context) if original.is_whole else None)
    cost = model_cost(inspection, parse_quantization_config(config["quantization_config"]))
    per_step = {"bops_per_step": list(cost.bops_per_step)} if cost.bops_per_step else {}
    whole = {} if inputs.whole is None else {"component_bytes": _component_bytes(original, files, inputs, context)}
    return {
        **whole,
        **per_step,
        "weight_bits_mean": round(cost.weight_bits_mean, 6),
        "act_bits_mean": round(cost.act_bits_mean, 6),
        "bops": cost.bops,
        "bops_fp32": cost.bops_fp32,
        "bytes": sum(size for path, (_, size) in files.items() if path.endswith(".safetensors")),
        "bytes_fp16": 2 * inspection["parameters"],
    }


def _component_bytes(
    original: Denoiser, packed: Mapping[str, tuple[str, int]], inputs: Inputs[str], context: TaskContext
) -> dict[str, dict[str, int]]:
    """Return bytes of each component's weights in the release and in the original; of components that have any."""
    assert inputs.whole is not None
    assert original.pipeline is not None
    home = denoiser_entry(original.pipeline)
    made = _weights_by_component(read_files(context.store, inputs.whole))
    made[str(home)] = sum(size for path, (_, size) in packed.items() if path.endswith(".safetensors"))
    given = _weights_by_component(read_files(context.store, inputs.model))
    return {name: {"bytes": made[name], "original": given[name]} for name in sorted(given)}


def _weights_by_component(files: Mapping[str, tuple[str, int]]) -> dict[str, int]:
    found: dict[str, int] = {}
    for path, (_, size) in files.items():
        home, slash, _ = path.partition("/")
        if slash and path.endswith(".safetensors"):
            found[home] = found.get(home, 0) + size
    return found


def _call(inputs: Inputs[str], context: TaskContext) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return a sample's shape and a row of what a pipeline tells its denoiser, as its first trajectory has them."""
    batch = CalibrationSet([context.store.local_path(inputs.references[0])]).rows(0, 0, 1)
    return torch.zeros_like(batch.x), dict(batch.conditioning)


def _grid_png(quality: Quality) -> bytes:
    """Draw one row for full precision, one for quantized, one for their difference."""
    reference, quantized = quality.reference_rgb, quality.quantized_rgb
    rows = torch.cat([reference, quantized, difference(reference, quantized)])
    zoom = max(1, _GRID_PIXELS // reference.shape[-1])
    buffer = io.BytesIO()
    Image.fromarray(grid(rows, columns=len(reference), zoom=zoom).numpy()).save(buffer, format="PNG")
    return buffer.getvalue()
