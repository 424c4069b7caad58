"""What codes of an attention's four operands cost: the same samples with all else in full precision.

    python -m benchmarks.attention_codes --model examples/models/emoji-sd --prompts examples/prompts/emoji.txt \
        --out benchmarks/results/attention-codes-emoji-sd.json

Only the two matrix products of every attention are quantized, to 8 bits. Static ranges are the least and greatest of
each step over the calibration seeds, of the whole operand or of each head; dynamic ones are of what is there, a range
for each token (of probabilities: for each row). "smooth key": the mean of all keys is subtracted before they are
quantized (SageAttention, arXiv:2410.02367, section 4.2), which changes no probability. "log": codes of -log2(p) / 24.
PSNR is of the final samples (in pixels, if the model is a pipeline) against full precision, with a 95 % interval over
seeds that calibration did not see.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import DDIMScheduler, DiffusionPipeline
from torch import Tensor, nn

from benchmarks.cli import keep, parser
from quant_core.diffusion.conditioning import draw_conditioning
from quant_core.diffusion.denoiser import call_denoiser, load_denoiser
from quant_core.metrics.psnr import psnr_per_sample
from quant_core.nn.attention import softmax_scores, wrap_processor
from quant_spec.enums import SampleSpace

LEVELS = 255
_LOG_RANGE = 24.0
_FIRST_CALIBRATION_SEED = 1_000_000


@dataclass(frozen=True, slots=True)
class Codes:
    """How the operands are quantized: "tensor", "head" (static), "token" (dynamic), "log", or None for not at all."""

    query_key: str | None
    value: str | None
    probabilities: str | None
    smooth_key: bool = False


VARIANTS = {
    "static": Codes("tensor", "tensor", "tensor"),
    "static, per head": Codes("head", "head", "head"),
    "static, smooth key": Codes("tensor", "tensor", "tensor", smooth_key=True),
    "static, per head, smooth key": Codes("head", "head", "head", smooth_key=True),
    "static, exact probabilities": Codes("tensor", "tensor", None),
    "static, log probabilities": Codes("tensor", "tensor", "log"),
    "static, probabilities by row": Codes("tensor", "tensor", "token"),
    "static, query and key alone": Codes("tensor", None, None),
    "static, probabilities alone": Codes(None, None, "tensor"),
    "static, value alone": Codes(None, "tensor", None),
    "by token": Codes("token", "token", "token"),
    "by token, smooth key": Codes("token", "token", "token", smooth_key=True),
    "by token, exact probabilities": Codes("token", "token", None),
    "query and key by token, smooth key; others exact": Codes("token", None, None, smooth_key=True),
}

Ranges = dict[tuple[str, int, str], tuple[Tensor, Tensor]]


@dataclass(slots=True)
class Attention:
    """Stands in for `scaled_dot_product_attention` of every attention; `codes` None records ranges of each head."""

    ranges: Ranges
    codes: Codes | None = None
    step: int = -1
    names: list[str] = field(default_factory=list)

    def call(self, name: str, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """Return softmax(Q K^T * scale + mask) V of quantized operands, shapes (batch, heads, tokens, width)."""
        smooth = key - key.mean(-2, keepdim=True)
        if self.codes is None:
            for operand, x in (("query", query), ("key", key), ("smooth", smooth), ("value", value)):
                self._see(name, operand, x)
            probabilities = softmax_scores(query, key, mask, scale)
            self._see(name, "probabilities", probabilities)
            return probabilities @ value
        codes, quantized = self.codes, partial(self._quantized, name)
        key = (
            quantized("smooth", smooth, codes.query_key) if codes.smooth_key else quantized("key", key, codes.query_key)
        )
        probabilities = softmax_scores(quantized("query", query, codes.query_key), key, mask, scale)
        return quantized("probabilities", probabilities, codes.probabilities) @ quantized("value", value, codes.value)

    def _see(self, name: str, operand: str, x: Tensor) -> None:
        low, high = x.amin((0, -2, -1), keepdim=True).clamp(max=0), x.amax((0, -2, -1), keepdim=True).clamp(min=0)
        if (known := self.ranges.get((name, self.step, operand))) is not None:
            low, high = torch.minimum(low, known[0]), torch.maximum(high, known[1])
        self.ranges[name, self.step, operand] = low, high

    def _quantized(self, name: str, operand: str, x: Tensor, kind: str | None) -> Tensor:
        if kind is None:
            return x
        if kind == "log":
            code = (-torch.log2(x.clamp(min=2.0**-_LOG_RANGE)) * LEVELS / _LOG_RANGE).round()
            return torch.where(code < LEVELS, torch.exp2(-code * _LOG_RANGE / LEVELS), 0.0)
        if kind == "token":
            low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
        else:
            low, high = self.ranges[name, self.step, operand]
            if kind == "tensor":
                low, high = low.amin(), high.amax()
        scale = ((high - low) / LEVELS).clamp(min=torch.finfo(x.dtype).tiny)
        zero = (-low / scale).round()
        return ((x / scale).round() + zero).clamp(0, LEVELS).sub(zero) * scale


@contextmanager
def watched(model: nn.Module, attention: Attention) -> Iterator[None]:
    """Let every attention of a model that has a processor run `attention`, which is told the step."""
    undo: list[Callable[[], None]] = []
    for name, module in model.named_modules():
        if getattr(module, "processor", None) is not None:
            undo.append(wrap_processor(module, partial(attention.call, name)))

    def next_step(*_: Any) -> None:
        attention.step += 1

    handle = model.register_forward_pre_hook(next_step)
    yield
    handle.remove()
    for each in undo:
        each()


Draw = Callable[[Sequence[int]], Tensor]


def bare(folder: str, steps: int) -> tuple[nn.Module, Draw]:
    """Return a denoiser and what draws samples of seeds with it: DDIM, eta 0."""
    denoiser = load_denoiser(folder)
    model = denoiser.model.eval()
    scheduler = DDIMScheduler.from_config(denoiser.scheduler_config)

    def draw(seeds: Sequence[int]) -> Tensor:
        shape = (model.config["in_channels"], model.config["sample_size"], model.config["sample_size"])
        x = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        conditioning = draw_conditioning(model, seeds, None)
        scheduler.set_timesteps(steps)
        for timestep in scheduler.timesteps:
            x = scheduler.step(call_denoiser(model, x, timestep, conditioning), timestep, x).prev_sample
        return x.clamp(-1, 1)

    return model, draw


def pipeline(
    folder: str, steps: int, guidance: float, prompts: list[Any], words: dict[str, Any]
) -> tuple[nn.Module, Draw]:
    """Return a pipeline's denoiser and what draws images in [-1, 1]; a seed's prompt is that of its number."""
    loaded: Any = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    model = getattr(loaded, "unet", None) or loaded.transformer

    def draw(seeds: Sequence[int]) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        told = [prompts[seed % len(prompts)] for seed in seeds]
        images = loaded(
            told, num_inference_steps=steps, guidance_scale=guidance, generator=generators, output_type="np", **words
        ).images
        return torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1

    return model, draw


@torch.no_grad()
def drawn(model: nn.Module, draw: Draw, attention: Attention | None, seeds: range, batch: int) -> Tensor:
    """Return the samples of some seeds, with or without another attention."""
    parts = []
    for first in range(seeds.start, seeds.stop, batch):
        some = range(first, min(first + batch, seeds.stop))
        if attention is None:
            parts.append(draw(some))
            continue
        attention.step = -1
        with watched(model, attention):
            parts.append(draw(some))
    return torch.cat(parts)


def measure(options: Namespace) -> dict[str, Any]:
    """Return PSNR and its interval for every variant."""
    if options.prompts:
        lines = options.prompts.read_text().splitlines()
        prompts: list[Any] = [int(line) if options.labels else line for line in lines if line]
        words = yaml.safe_load(options.arguments)
        model, draw = pipeline(options.model, options.steps, options.guidance, prompts, words)
    else:
        model, draw = bare(options.model, options.steps)
    seeds = range(options.seeds)
    calibration = range(_FIRST_CALIBRATION_SEED, _FIRST_CALIBRATION_SEED + options.calibration)
    reference = drawn(model, draw, None, seeds, options.batch)
    ranges: Ranges = {}
    drawn(model, draw, Attention(ranges), calibration, options.batch)
    rows = {}
    for name in options.variants:
        codes = VARIANTS[name]
        values = psnr_per_sample(
            reference, drawn(model, draw, Attention(ranges, codes), seeds, options.batch), SampleSpace.PIXELS
        )
        half = 1.96 * float(values.std()) / len(values) ** 0.5
        rows[name] = {"psnr_db": round(float(values.mean()), 2), "psnr_db_ci95": round(half, 2)}
        sys.stderr.write(f"{name}: {rows[name]}\n")
    return rows


def main() -> None:
    """Measure all variants on one model and print one JSON document."""
    options = parser(__doc__)
    options.add_argument("--model", required=True)
    options.add_argument("--prompts", type=Path, help="of a pipeline, one to a line; without it, the denoiser alone")
    options.add_argument("--labels", action="store_true", help="prompts are class labels")
    options.add_argument(
        "--arguments", default="{}", help="of the pipeline's call, such as '{max_sequence_length: 24}'"
    )
    options.add_argument("--guidance", type=float, default=4.0)
    options.add_argument("--steps", type=int, default=20)
    options.add_argument("--seeds", type=int, default=64)
    options.add_argument("--calibration", type=int, default=32)
    options.add_argument("--batch", type=int, default=16)
    options.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    options.add_argument("--out", type=Path, required=True)
    arguments = options.parse_args()
    rows = measure(arguments)
    told = {name: getattr(arguments, name) for name in ("model", "steps", "seeds", "calibration")}
    guidance = arguments.guidance if arguments.prompts else None
    told |= {"guidance_scale": guidance, "first_calibration_seed": _FIRST_CALIBRATION_SEED}
    keep(told | {"rows": rows}, arguments.out)


if __name__ == "__main__":
    main()
