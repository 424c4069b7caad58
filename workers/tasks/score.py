"""Score: the figures of a packed model over all its evaluation shards, and pictures to look at.

The score is JSON, a release's metrics; the grid a PNG with rows full precision, quantized, difference x 4, a column per
seed; the samples safetensors with the same images, `reference` and `quantized` (k, 3, H, W) float32 in [-1, 1].
Metrics: `metrics`, as in the score.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save

from quant_core.artifact.folder import CONFIG_FILE, parse_quantization_config
from quant_core.diffusion.calibration import CalibrationSet
from quant_core.diffusion.denoiser import Denoiser, has_signals
from quant_core.inspect.first_call import Call
from quant_core.inspect.inspection import describe_layers, trace_model
from quant_core.metrics.clip_score import ClipScore
from quant_core.metrics.cost import difference_state_bytes, model_cost
from quant_core.metrics.evaluation import Quality, summarize
from quant_core.metrics.frechet import ResizedFeatures, efficientnet_lite0, inception_v3
from quant_core.metrics.images import difference, grid
from quant_core.metrics.lpips import Lpips, lpips_per_sample
from quant_core.metrics.psnr import mean_with_ci
from quant_spec.documents import read_json
from quant_spec.enums import Extractor, ShownSeeds
from quant_spec.formats import ModelFormat
from quant_spec.keys import canonical_json
from quant_spec.metrics import check_computed
from quant_spec.pipeline import denoiser_entry
from quant_spec.prompts import PromptFile, PromptLine, line_of, seed_of, unbundle
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
    worst = params.shown is ShownSeeds.WORST
    places = quality.worst(params.grid) if worst else list(range(min(params.grid, params.seeds.count)))
    if worst:
        metrics["shown_seeds"] = [params.seeds.first + place for place in places]
    if params.part is not None:
        lines = read_lines(original, inputs.prompts, params.part, context)
        told = [line_of(lines, seed) for seed in params.seeds.range]
        drawn = [seed_of(line, seed) for line, seed in zip(told, params.seeds.range, strict=True)]
        metrics |= _prompts(told, drawn, quality, params.grid, places)
        columns = [name for name, value in told[0].more if isinstance(value, PromptFile)]
        metrics["prompts"] = {"file": inputs.prompts, "part": params.part.value, "lines": len(lines)}
        metrics["prompts"] |= {"files": columns} if columns else {}
        if inputs.clip is not None:
            metrics |= _clip_scores(told, quality, inputs.clip, context)
    if inputs.lpips is not None:
        metrics |= _lpips(quality, inputs.lpips, context)
    check_computed(metrics)
    pictures = quality.shown(places)
    images = {"reference": pictures.reference_rgb.contiguous(), "quantized": pictures.quantized_rgb.contiguous()}
    outputs = {
        SCORE: context.store.put_bytes(canonical_json(metrics).encode()),
        GRID: context.store.put_bytes(_grid_png(pictures)),
        SAMPLES: context.store.put_bytes(save(images)),
    }
    return TaskOutput(outputs, {"metrics": metrics})


def _prompts(
    told: Sequence[PromptLine], drawn: Sequence[int], quality: Quality, count: int, shown: Sequence[int]
) -> dict[str, Any]:
    """Return the prompts that came out worst, and those that pictures show, with the seeds that drew them."""
    worst = [
        {"prompt": told[place].text, "seed": drawn[place], "psnr_db": round(quality.psnr_db[place], 6)}
        for place in quality.worst(count)
    ]
    own = any(line.seed is not None for line in told)
    seeds = {"shown_seeds": [drawn[place] for place in shown]} if own else {}
    return {"worst_prompts": worst, "shown_prompts": [told[place].text for place in shown], **seeds}


def _clip_scores(told: Sequence[PromptLine], quality: Quality, clip: str, context: TaskContext) -> dict[str, float]:
    """Return how well both models' images fit their prompts, by the user's CLIP model."""
    folder = context.scratch / "clip"
    folder.mkdir()
    for name, content in unbundle(context.store.get_bytes(clip), f"clip {clip[:12]}").items():
        (folder / name).write_bytes(content)
    score = ClipScore(folder, context.device)
    texts = [line.text for line in told]
    sides = {"clip_score": quality.quantized_rgb, "clip_score_full_precision": quality.reference_rgb}
    return {name: round(fmean(score(images, texts)), 6) for name, images in sides.items()}


def _lpips(quality: Quality, weights: str, context: TaskContext) -> dict[str, Any]:
    """Return how far images are from full precision's of the same seeds, by the network that the user has."""
    network = Lpips(context.store.local_path(weights)).to(context.device)
    found = mean_with_ci(lpips_per_sample(quality.reference_rgb, quality.quantized_rgb, network, device=context.device))
    return {"lpips": round(found.value, 6), "lpips_ci95": round(found.ci95, 6), "lpips_network": network.network}


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
    call = _call(inputs, context) if original.is_whole else None
    formats = parse_quantization_config(config["quantization_config"])
    cost = model_cost(describe_layers(original, call), formats)
    per_step = {"bops_per_step": list(cost.bops_per_step)} if cost.bops_per_step else {}
    whole = {} if inputs.whole is None else {"component_bytes": _component_bytes(original, files, inputs, context)}
    return {
        **whole,
        **per_step,
        **_state(original, call, formats),
        "weight_bits_mean": round(cost.weight_bits_mean, 6),
        "act_bits_mean": round(cost.act_bits_mean, 6),
        "bops": cost.bops,
        "bops_fp32": cost.bops_fp32,
        "bytes": sum(size for path, (_, size) in files.items() if path.endswith(".safetensors")),
        "bytes_fp16": 2 * sum(parameter.numel() for parameter in original.model.parameters()),
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


def _state(original: Denoiser, call: Call | None, formats: ModelFormat) -> dict[str, int]:
    """Return what layers remember between steps, if any do."""
    if not any(spec.activation is not None and spec.activation.differences for spec in formats.layers.values()):
        return {}
    return {"difference_state_bytes": difference_state_bytes(trace_model(original, call), formats)}


def _call(inputs: Inputs[str], context: TaskContext) -> Call:
    """Return what a pipeline calls its denoiser with, as its first trajectory has it."""
    batch = CalibrationSet([context.store.local_path(inputs.references[0])]).rows(0, 0, 1)
    return Call(torch.zeros_like(batch.x), torch.zeros_like(batch.timestep[0]), batch.conditioning)


def _grid_png(quality: Quality) -> bytes:
    """Draw one row for full precision, one for quantized, one for their difference."""
    reference, quantized = quality.reference_rgb, quality.quantized_rgb
    rows = torch.cat([reference, quantized, difference(reference, quantized)])
    zoom = max(1, _GRID_PIXELS // reference.shape[-1])
    buffer = io.BytesIO()
    Image.fromarray(grid(rows, columns=len(reference), zoom=zoom).numpy()).save(buffer, format="PNG")
    return buffer.getvalue()
