"""Releases beside what optimum-quanto and torchao make of the same pipeline: images in one run, by the same calls.

    pip install --no-deps optimum-quanto==0.2.7 torchao==0.18.0
    python -m benchmarks.other_tools --model examples/models/emoji-sd --prompts examples/prompts/emoji.txt \\
        --release dmq-w8a8=FOLDER --release fast-w4a8=FOLDER --out benchmarks/results/other-tools-emoji-sd.json

Each FOLDER is what `quantmill artifacts pull` gave. Every pipeline is called as its users call it, in float32, with the
same generators; images are compared with those of full precision as power of the error in pixels of 0 to 1. Prompts
are those that evaluation uses, of which no calibration saw one. quanto quantizes linears and convolutions, and sets the
ranges of activations by calibration prompts; torchao quantizes linears. `bytes` are those of the denoiser's tensors,
codes counted at their width, also where a tool keeps 4-bit codes in bytes.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from numpy.typing import NDArray
from torch import Tensor, nn

import quant_core  # noqa: F401 - packed components load once it is imported
from benchmarks.cli import give, keep, named, parser
from quant_core.diffusion.pipeline import denoiser_of
from quant_spec.prompts import PromptLine, PromptPart, line_of, read_prompts, select_part

FIRST_SEED, CALIBRATION_SEED = 0, 1_000_000
Images = NDArray[np.float64]
Draw = Callable[[Any, Sequence[PromptLine], Sequence[int]], Images]


def quanto(weights: str, model: nn.Module, calibrate: Callable[[], object]) -> None:
    """Quantize a model in place: weights of 8 or 4 bits, activations of 8."""
    from optimum.quanto import Calibration, freeze, qint4, qint8, quantize

    quantize(model, weights={"int8": qint8, "int4": qint4}[weights], activations=qint8)
    with Calibration():
        calibrate()
    freeze(model)


def torchao(config: str, model: nn.Module, calibrate: Callable[[], object]) -> None:
    """Quantize a model's linears in place; nothing is calibrated."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    configs = {
        "int8 dynamic": Int8DynamicActivationInt8WeightConfig,
        "int4 weights": lambda: IntxWeightOnlyConfig(weight_dtype=vars(torch)["int4"], granularity=PerGroup(32)),
    }
    quantize_(model, configs[config]())


TOOLS: dict[str, tuple[Callable[..., None], str]] = {
    "quanto int8 weights, int8 activations": (quanto, "int8"),
    "quanto int4 weights, int8 activations": (quanto, "int4"),
    "torchao int8 dynamic": (torchao, "int8 dynamic"),
    "torchao int4 weights": (torchao, "int4 weights"),
}


def stored(value: Tensor, bits: int | None = None) -> Iterator[float]:
    """Yield the bytes of a tensor's parts, codes at their own width."""
    if hasattr(value, "__tensor_flatten__"):
        width = getattr(getattr(value, "qtype", None), "bits", None) or getattr(value, "bits", None)
        if str(getattr(value, "target_dtype", "")) == "torch.int4":
            width = 4
        for name in value.__tensor_flatten__()[0]:
            part = getattr(value, name)
            yield from stored(part, width if name in ("_data", "qdata") else None)
    elif bits is not None and not value.is_floating_point() and value.dtype != torch.uint8:
        yield value.numel() * bits / 8
    else:
        yield value.numel() * value.element_size()


def size(model: nn.Module) -> int:
    """Return the bytes of a model's parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return round(sum(sum(stored(tensor.data)) for tensor in tensors))


def compare(images: Images, reference: Images) -> dict[str, float]:
    """Return the mean PSNR over images in dB, its 95 % interval's half-width, and the PSNR of the mean error."""
    errors = ((images - reference) ** 2).mean(axis=(1, 2, 3))
    psnr = -10 * np.log10(np.maximum(errors, 1e-12))
    return {
        "psnr_db": round(float(psnr.mean()), 3),
        "psnr_db_ci95": round(1.96 * float(psnr.std(ddof=1)) / math.sqrt(len(psnr)), 3),
        "psnr_of_mean_error_db": round(-10 * math.log10(max(float(errors.mean()), 1e-12)), 3),
        "n": len(psnr),
    }


def drawing(options: argparse.Namespace) -> Draw:
    """Return how images are drawn: pipeline, lines and seeds to pixels of 0 to 1, a sample in each row."""
    extra = {"max_sequence_length": options.max_sequence_length} if options.max_sequence_length else {}

    def draw(pipeline: Any, lines: Sequence[PromptLine], seeds: Sequence[int]) -> Images:
        images = []
        for start in range(0, len(seeds), options.batch):
            some = seeds[start : start + options.batch]
            told = [line_of(lines, seed) for seed in some]
            if told[0].class_label is not None:
                asked: dict[str, Any] = {"class_labels": [line.class_label for line in told]}
            else:
                sides = {"height": options.side, "width": options.side}
                asked = {"prompt": [line.prompt for line in told], **sides, **extra}
            generators = [torch.Generator().manual_seed(seed) for seed in some]
            steps = {"num_inference_steps": options.steps, "guidance_scale": options.guidance}
            images.append(pipeline(**asked, **steps, generator=generators, output_type="np").images)
        return np.concatenate(images).astype(np.float64)

    return draw


def load(folder: Path) -> Any:
    """Load a pipeline as a user does."""
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def known(out: Path, document: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what the file says already, if it was measured alike; else nothing."""
    found = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
    results: dict[str, dict[str, Any]] = found.pop("results", {})
    return results if found == document else {}


def main() -> None:
    """Measure every tool and release, and write one JSON document."""
    options = parser(__doc__)
    options.add_argument("--model", type=Path, required=True)
    options.add_argument("--prompts", type=Path, help="as quantmill takes it; without, class labels")
    options.add_argument("--classes", type=int, default=9, help="how many class labels there are, without prompts")
    options.add_argument("--release", action="append", default=[], metavar="NAME=FOLDER")
    options.add_argument("--tools", nargs="*", choices=list(TOOLS), default=list(TOOLS))
    options.add_argument("--seeds", type=int, default=64)
    options.add_argument("--steps", type=int, default=20)
    options.add_argument("--guidance", type=float, default=4.0)
    options.add_argument("--side", type=int, default=64, help="pixels; of a pipeline with prompts")
    options.add_argument("--max-sequence-length", type=int)
    options.add_argument("--batch", type=int, default=32)
    options.add_argument(
        "--out", type=Path, required=True, help="what it has already is kept, if it was measured alike"
    )
    given = options.parse_args()
    torch.set_num_threads(1)
    if given.prompts is None:
        lines: Sequence[PromptLine] = [PromptLine(class_label=label) for label in range(given.classes)]
    else:
        lines = read_prompts(given.prompts.read_bytes(), given.prompts.name)
    seen, unseen = (select_part(lines, part) for part in (PromptPart.CALIBRATION, PromptPart.EVALUATION))
    draw, full = drawing(given), load(given.model)
    name = next(key for key, value in full.components.items() if value is denoiser_of(full))
    seeds = range(FIRST_SEED, FIRST_SEED + given.seeds)
    reference = draw(full, unseen, seeds)
    protocol = {key: getattr(given, key) for key in ("steps", "guidance", "batch", "seeds")}
    versions = {each: metadata.version(each) for each in ("torch", "diffusers", "optimum-quanto", "torchao")}
    document = {"model": given.model.name, **protocol, "versions": versions}
    results = known(given.out, document)
    calibrating = range(CALIBRATION_SEED, CALIBRATION_SEED + 16)
    for tool in (tool for tool in given.tools if tool not in results):
        quantize, config = TOOLS[tool]
        changed = copy.copy(full)
        model = copy.deepcopy(getattr(full, name))
        changed.register_modules(**{name: model})
        started = time.perf_counter()
        quantize(config, model, lambda to=changed: draw(to, seen, calibrating))
        seconds = round(time.perf_counter() - started, 1)
        results[tool] = {**compare(draw(changed, unseen, seeds), reference), "bytes": size(model), "seconds": seconds}
        keep({**document, "results": results}, given.out)
    for release, folder in named(given.release).items():
        pulled = load(Path(folder))
        packed = sum(file.stat().st_size for file in Path(folder, name).glob("*.safetensors"))
        results[release] = {**compare(draw(pulled, unseen, seeds), reference), "bytes": packed}
    give({**document, "results": results}, given.out)


if __name__ == "__main__":
    main()
