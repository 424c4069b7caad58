"""Metrics of a release, as one table: what each means, and how and where it is shown.

A new metric is a row of `METRICS`, and the place that computes it (`workers.tasks.score`); the model card, the report,
the command line, `artifacts diff` and docs/metrics.md read the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from quant_spec.errors import InvalidInputError
from quant_spec.numbers import human_bytes, human_count

#: All metrics of a release, by name.
Values = Mapping[str, Any]


class Direction(StrEnum):
    """Which of two values is better."""

    HIGHER = "higher"
    LOWER = "lower"
    NEITHER = "neither"


class Place(StrEnum):
    """Where metrics are shown. Behind each name: what one has there after its label."""

    CARD = "model card"  # this model, full precision
    HUB = "model card's head"  # the Hub's type of metric; the label is its name
    REPORT = "report"  # the numbers at the top: value, what is said beside it
    COST = "report's comparison"  # this release, original, ratio
    STEPS = "report's chart"  # over the steps of the sampler: label of the axis, a note
    JOB = "jobs show"  # value; also `run`, `jobs wait` and `artifacts show`
    RELEASES = "artifacts ls"  # value; the label is the column's heading
    README = "README"  # value; the label is the column's heading


class Listing(StrEnum):
    """Where the protocol is listed, each entry as it is."""

    CARD = "model card"
    REPORT = "report"


EVERYWHERE = frozenset(Listing)


@dataclass(frozen=True, slots=True)
class Shown:
    """How a place shows a metric.

    Attributes
    ----------
    label
        What it is called there; {name} stands for another metric.
    texts
        From all metrics to what follows the label. None: the value, by the metric's `format` and `unit`.
    rank
        Least first; metrics of the same rank are in the order of the table.
    """

    label: str
    texts: Callable[[Values], tuple[str, ...]] | None = None
    rank: int = 100


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric, or one entry of the protocol that metrics are measured with.

    Attributes
    ----------
    meaning
        One sentence, without the full stop.
    unit
        Empty for a plain number.
    direction
        Which of two values is better.
    format
        Python's format of one value.
    is_required
        No release is published without it.
    is_number
        It is a single number, which `artifacts diff` compares.
    places
        Where it is shown, and how.
    listed
        Where it is listed as part of the protocol.
    """

    meaning: str
    unit: str = ""
    direction: Direction = Direction.NEITHER
    format: str = ""
    is_required: bool = False
    is_number: bool = False
    places: Mapping[Place, Shown] = field(default_factory=dict)
    listed: frozenset[Listing] = frozenset()

    def plain_texts(self, place: Place, value: Any) -> tuple[str, ...]:
        """Return what a place shows of it, if the table does not say more."""
        text = format(value, self.format)
        named = f"{text} {self.unit}".rstrip()
        if place is Place.CARD:
            return (text, "–")
        if place is Place.REPORT:
            return (named, "")
        if place is Place.COST:
            return (named, "–", "–")
        return (text,) if place is Place.README else (named,)


def _psnr_job(values: Values) -> tuple[str, ...]:
    interval = values["psnr_db_ci95"]
    spread = f" ± {interval:.2f}" if isinstance(interval, int | float) else ""
    return (f"{values['psnr_db']:.2f} dB{spread} (same seeds against full precision, n={values['n']})",)


def _psnr_card(values: Values) -> tuple[str, ...]:
    low, high = (values["psnr_db"] + sign * values["psnr_db_ci95"] for sign in (-1, 1))
    return (f"{values['psnr_db']:.2f} ({low:.2f} to {high:.2f})", "–")


def _worst_step(values: Values) -> tuple[str, ...]:
    steps = [value for value in values["sqnr_db_per_step"] if math.isfinite(value)]
    return (f"{min(steps):.1f} dB" if steps else "–", "of the prediction")


def _size_job(values: Values) -> tuple[str, ...]:
    size, half = values["bytes"], values["bytes_fp16"]
    return (f"{human_bytes(size)}, fp16 {human_bytes(half)}: {half / size:.2f}x smaller",)


def _component_sizes(values: Values) -> tuple[str, str]:
    """Return bytes of a pipeline's components, in the release and in the original."""
    parts = values["component_bytes"]
    return tuple(  # type: ignore[return-value]
        ", ".join(f"{name} {human_bytes(part[key])}" for name, part in parts.items()) for key in ("bytes", "original")
    )


def _total(values: Values, key: str) -> int:
    return sum(part[key] for part in values["component_bytes"].values())


def _bits(name: str) -> Callable[[Values], tuple[str, ...]]:
    """Return what the report compares of mean bits: those, float32's and their ratio."""
    return lambda values: (f"{values[name]:.2f}", "32", f"{32 / values[name]:.2f}×")


def _size(values: Values, original: float) -> tuple[str, ...]:
    return (human_bytes(values["bytes"]), human_bytes(original), f"{original / values['bytes']:.2f}×")


def _by_step(values: Values) -> tuple[str, ...]:
    least, greatest = (human_count(find(values["bops_per_step"])) for find in (min, max))
    return (f"{least} to {greatest}", "–", "–")


METRICS: dict[str, Metric] = {
    "psnr_db": Metric(
        "Peak signal-to-noise ratio of samples against full precision's samples of the same seeds, mean over n",
        unit="dB",
        direction=Direction.HIGHER,
        format=".2f",
        is_required=True,
        is_number=True,
        places={
            Place.HUB: Shown("PSNR against full precision, dB", lambda _: ("psnr",)),
            Place.CARD: Shown("PSNR, dB (95 % interval)", _psnr_card, 5),
            Place.REPORT: Shown(
                "PSNR, same seeds",
                lambda v: (f"{v['psnr_db']:.2f} dB", f"± {v['psnr_db_ci95']:.2f} (95 %), n = {v['n']}"),
                1,
            ),
            Place.JOB: Shown("psnr", _psnr_job),
            Place.RELEASES: Shown("PSNR"),
            Place.README: Shown("PSNR, dB (95 %)", lambda v: (f"{v['psnr_db']:.1f} ± {v['psnr_db_ci95']:.1f}",)),
        },
    ),
    "psnr_db_ci95": Metric(
        "Half the width of the 95 % interval of psnr_db (Student's t over seeds)",
        unit="dB",
        direction=Direction.LOWER,
        format=".2f",
        is_required=True,
        is_number=True,
    ),
    "psnr_db_of_mean": Metric(
        "PSNR of the squared error averaged over the samples; below psnr_db where few samples are far off",
        unit="dB",
        direction=Direction.HIGHER,
        format=".2f",
        is_number=True,
        places={Place.CARD: Shown("PSNR of the mean error, dB", lambda v: (f"{v['psnr_db_of_mean']:.2f}", "–"), 5)},
    ),
    "fd": Metric(
        "Feature distance: Fréchet distance between features of the quantized and of full precision's samples of the "
        "same seeds; it goes with PSNR, and is no distance of distributions (kid is)",
        direction=Direction.LOWER,
        format=".4g",
        is_required=True,
        is_number=True,
        places={
            Place.HUB: Shown("Feature distance, same seeds, {fd_extractor}", lambda _: ("fd",)),
            Place.CARD: Shown("feature distance, same seeds, {fd_extractor}", lambda v: (f"{v['fd']:.4g}", "0"), 6),
            Place.REPORT: Shown(
                "Feature distance, same seeds",
                lambda v: (f"{v['fd']:.3g}", str(v["fd_extractor"]).partition("-imagenet")[0]),
                3,
            ),
            Place.JOB: Shown(
                "fd", lambda v: (f"{v['fd']:.4g} ({v['fd_extractor']}, against full precision's samples)",)
            ),
            Place.README: Shown("feature distance", lambda v: (f"{v['fd']:.{2 if v['fd'] < 10 else 1}f}",)),
        },
    ),
    "kid": Metric(
        "Kernel distance (KID, unbiased) between features of the quantized samples and of full precision's samples of "
        "other seeds: two halves of the seeds, each against the other's",
        direction=Direction.LOWER,
        format=".3g",
        is_number=True,
        places={
            Place.CARD: Shown(
                "KID, other seeds, {fd_extractor}", lambda v: (f"{v['kid']:.3g}", f"{v['kid_full_precision']:.3g}"), 6
            ),
        },
    ),
    "kid_full_precision": Metric(
        "The same of full precision's samples in place of the quantized: what chance alone gives",
        format=".3g",
        is_number=True,
    ),
    "ssim": Metric(
        "Structural similarity (11 x 11 Gaussian window) of a pipeline's images with full precision's of the same "
        "seeds, mean over n",
        direction=Direction.HIGHER,
        format=".4f",
        is_number=True,
        places={
            Place.CARD: Shown("SSIM", lambda v: (f"{v['ssim']:.4f} (± {v['ssim_ci95']:.4f})", "1"), 6),
            Place.REPORT: Shown("SSIM", lambda v: (f"{v['ssim']:.4f}", f"± {v['ssim_ci95']:.4f} (95 %)"), 1),
            Place.JOB: Shown("ssim", lambda v: (f"{v['ssim']:.4f} ± {v['ssim_ci95']:.4f}",)),
        },
    ),
    "ssim_ci95": Metric(
        "Half the width of the 95 % interval of ssim", direction=Direction.LOWER, format=".4f", is_number=True
    ),
    "latent_sqnr_db": Metric(
        "Signal-to-quantization-noise ratio of the latents that a pipeline decodes, mean over n",
        unit="dB",
        direction=Direction.HIGHER,
        format=".2f",
        is_number=True,
        places={Place.CARD: Shown("SQNR of the latents, dB", rank=7)},
    ),
    "clip_score": Metric(
        "CLIP score of a pipeline's images and their prompts (100 times the cosine), by the CLIP model in the recipe's "
        "`evaluation.clip`, mean over n",
        direction=Direction.HIGHER,
        format=".2f",
        is_number=True,
        places={
            Place.CARD: Shown(
                "CLIP score", lambda v: (f"{v['clip_score']:.2f}", f"{v['clip_score_full_precision']:.2f}"), 6
            ),
            Place.REPORT: Shown(
                "CLIP score",
                lambda v: (f"{v['clip_score']:.2f}", f"full precision {v['clip_score_full_precision']:.2f}"),
                1,
            ),
            Place.JOB: Shown(
                "clip",
                lambda v: (f"{v['clip_score']:.2f}, full precision {v['clip_score_full_precision']:.2f}",),
            ),
        },
    ),
    "clip_score_full_precision": Metric(
        "The same of full precision's images", direction=Direction.HIGHER, format=".2f", is_number=True
    ),
    "lpips": Metric(
        "Learned perceptual image patch similarity (LPIPS) of images with full precision's of the same seeds, 0 for "
        "equal ones, by the network in the recipe's `evaluation.lpips`, mean over n",
        direction=Direction.LOWER,
        format=".4f",
        is_number=True,
        places={
            Place.CARD: Shown(
                "LPIPS, {lpips_network}", lambda v: (f"{v['lpips']:.4f} (± {v['lpips_ci95']:.4f})", "0"), 6
            ),
            Place.REPORT: Shown("LPIPS", lambda v: (f"{v['lpips']:.4f}", f"± {v['lpips_ci95']:.4f} (95 %)"), 1),
            Place.JOB: Shown("lpips", lambda v: (f"{v['lpips']:.4f} ± {v['lpips_ci95']:.4f} ({v['lpips_network']})",)),
        },
    ),
    "lpips_ci95": Metric(
        "Half the width of the 95 % interval of lpips", direction=Direction.LOWER, format=".4f", is_number=True
    ),
    "worst_prompts": Metric(
        "Prompts whose images are farthest from full precision's, with seed and PSNR, worst first",
        places={
            Place.CARD: Shown(
                "worst prompt",
                lambda v: (f"{v['worst_prompts'][0]['prompt']}: {v['worst_prompts'][0]['psnr_db']:.2f} dB", "–"),
                8,
            ),
            Place.JOB: Shown(
                "worst",
                lambda v: (
                    "; ".join(f"{each['prompt']} ({each['psnr_db']:.1f} dB)" for each in v["worst_prompts"][:3]),
                ),
            ),
        },
    ),
    "weight_bits_mean": Metric(
        "Bits of a weight, mean over the weights of all Conv and Linear layers; a table of a layer's outputs counts "
        "its own bits in place of the layer's",
        unit="bits",
        direction=Direction.LOWER,
        format=".2f",
        is_required=True,
        is_number=True,
        places={
            Place.CARD: Shown("weights, mean bits", lambda v: (f"{v['weight_bits_mean']:.2f}", "32"), 2),
            Place.REPORT: Shown(
                "Mean bits",
                lambda v: (f"{v['weight_bits_mean']:.2f} / {v['act_bits_mean']:.2f}", "weights / activations"),
                5,
            ),
            Place.COST: Shown("bits of a weight, mean", _bits("weight_bits_mean"), 3),
            Place.JOB: Shown(
                "bits",
                lambda v: (f"weights {v['weight_bits_mean']:.2f}, activations {v['act_bits_mean']:.2f} on average",),
            ),
            Place.RELEASES: Shown("BITS W/A", lambda v: (f"{v['weight_bits_mean']:.2f}/{v['act_bits_mean']:.2f}",)),
            Place.README: Shown("bits per weight"),
        },
    ),
    "act_bits_mean": Metric(
        "Bits of a layer's input, mean over the multiplications of all Conv and Linear layers and the sampler's steps",
        unit="bits",
        direction=Direction.LOWER,
        format=".2f",
        is_required=True,
        is_number=True,
        places={
            Place.CARD: Shown("activations, mean bits", lambda v: (f"{v['act_bits_mean']:.2f}", "32"), 3),
            Place.COST: Shown("bits of an activation, mean", _bits("act_bits_mean"), 4),
        },
    ),
    "bytes": Metric(
        "Size of the release's safetensors files",
        unit="bytes",
        direction=Direction.LOWER,
        format="d",
        is_required=True,
        is_number=True,
        places={
            Place.CARD: Shown(
                "weights, MiB",
                lambda v: (f"{v['bytes'] / 2**20:.2f}", f"{v['bytes_fp16'] / 2**20:.2f} (fp16)"),
                1,
            ),
            Place.REPORT: Shown(
                "Weights",
                lambda v: (human_bytes(v["bytes"]), f"{v['bytes_fp16'] / v['bytes']:.2f}× under fp16"),
                4,
            ),
            Place.COST: Shown("weights, against fp16", lambda v: _size(v, v["bytes_fp16"]), 1),
            Place.JOB: Shown("size", _size_job),
            Place.README: Shown("weights file", lambda v: (human_bytes(v["bytes"]),)),
        },
    ),
    "component_bytes": Metric(
        "Bytes of the weights of each component of a whole pipeline, in the release and in the original, by name",
        places={
            Place.CARD: Shown("weights by component", _component_sizes, 1),
            Place.COST: Shown(
                "weights, whole pipeline",
                lambda v: (
                    human_bytes(_total(v, "bytes")),
                    human_bytes(_total(v, "original")),
                    f"{_total(v, 'original') / _total(v, 'bytes'):.2f}×",
                ),
                1,
            ),
            Place.REPORT: Shown(
                "Weights, whole pipeline", lambda v: (human_bytes(_total(v, "bytes")), _component_sizes(v)[0]), 5
            ),
            Place.JOB: Shown("components", lambda v: (_component_sizes(v)[0],)),
        },
    ),
    "bytes_fp16": Metric(
        "Size of the original's parameters in float16",
        unit="bytes",
        format="d",
        is_required=True,
        is_number=True,
        places={Place.COST: Shown("weights, against fp32", lambda v: _size(v, 2 * v["bytes_fp16"]), 1)},
    ),
    "bops": Metric(
        "Bit operations of one call of the denoiser at batch 1: multiplications times the bits of both factors, mean "
        "over the steps of the sampler",
        direction=Direction.LOWER,
        format=".4g",
        is_required=True,
        is_number=True,
        places={
            Place.CARD: Shown("bit operations per forward", lambda v: (f"{v['bops']:.4g}", f"{v['bops_fp32']:.4g}"), 4),
            Place.REPORT: Shown(
                "Bit operations", lambda v: (f"{v['bops_fp32'] / v['bops']:.1f}×", "fewer than fp32"), 6
            ),
            Place.COST: Shown(
                "bit operations of one forward",
                lambda v: (
                    human_count(v["bops"]),
                    f"{human_count(v['bops_fp32'])} (fp32)",
                    f"{v['bops_fp32'] / v['bops']:.2f}×",
                ),
                2,
            ),
            Place.JOB: Shown("bops", lambda v: (f"{v['bops_fp32'] / v['bops']:.1f}x fewer than fp32",)),
        },
    ),
    "bops_fp32": Metric("The same of the original in float32", format=".4g", is_required=True, is_number=True),
    "sqnr_db_per_step": Metric(
        "Signal-to-quantization-noise ratio of the denoiser's prediction at each step of the sampler, on full "
        "precision's trajectories",
        unit="dB",
        direction=Direction.HIGHER,
        is_required=True,
        places={
            Place.CARD: Shown(
                "SQNR of the prediction, dB, worst step", lambda v: (f"{min(v['sqnr_db_per_step']):.2f}", "–"), 7
            ),
            Place.REPORT: Shown("SQNR, worst step", _worst_step, 2),
            Place.STEPS: Shown(
                "Error along the trajectory",
                lambda _: (
                    "SQNR, dB",
                    "Signal to quantization noise of the denoiser's prediction at each step of the sampler, both "
                    "models given the full-precision trajectory's input. Step 0 starts from pure noise.",
                ),
            ),
        },
    ),
    "bops_per_step": Metric(
        "bops at each step of the sampler, where the bits of activations differ between steps",
        direction=Direction.LOWER,
        places={Place.COST: Shown("bit operations by step", _by_step, 2)},
        # A release's digest covers its card, which has always listed them.
        listed=frozenset({Listing.CARD}),
    ),
    "difference_state_bytes": Metric(
        "What layers in differences remember between steps, for each row of the denoiser's batch (guided sampling has "
        "two for a sample)",
        unit="bytes",
        direction=Direction.LOWER,
        format="d",
        is_number=True,
        places={
            Place.CARD: Shown("remembered between steps, bytes per row", rank=5),
            Place.COST: Shown(
                "remembered between steps, per row",
                lambda v: (human_bytes(v["difference_state_bytes"]), "0 bytes", "–"),
                5,
            ),
            Place.JOB: Shown(
                "state", lambda v: (f"{human_bytes(v['difference_state_bytes'])} per row, between steps",)
            ),
        },
    ),
    "timesteps": Metric(
        "Timesteps of the sampler, noisiest first",
        listed=frozenset({Listing.CARD}),
    ),
    "sampler": Metric(
        "How samples were drawn: scheduler, steps, eta, guidance and the rest of the recipe's section",
        is_required=True,
        listed=EVERYWHERE,
    ),
    "seeds": Metric("Seeds of the samples: the first, and how many", listed=EVERYWHERE),
    "shown_prompts": Metric("Prompts of the seeds that the pictures show, in order"),
    "shown_seeds": Metric("Seeds that the pictures show, in order, where they are not the first"),
    "prompts": Metric(
        "What a whole pipeline was told: SHA-256 of the prompts file, or all classes, and how many different lines",
        listed=EVERYWHERE,
    ),
    "n": Metric(
        "How many samples psnr_db and fd are of", is_required=True, is_number=True, format="d", listed=EVERYWHERE
    ),
    "sqnr_seeds": Metric("How many of the seeds sqnr_db_per_step is of", is_number=True, format="d", listed=EVERYWHERE),
    "samples": Metric(
        "Whether samples are pixels, compared after clamping to [-1, 1], or latents, compared as they are",
        listed=EVERYWHERE,
    ),
    "lpips_network": Metric("Network whose features lpips compares", listed=EVERYWHERE),
    "fd_extractor": Metric(
        "Network whose features fd compares, and the pixels that it gets", is_required=True, listed=EVERYWHERE
    ),
}


def missing(values: Values) -> list[str]:
    """Return the names of required metrics that a release lacks."""
    return [name for name, metric in METRICS.items() if metric.is_required and values.get(name) is None]


def check_computed(values: Values) -> None:
    """Raise InvalidInputError unless the metrics are exactly those that the table knows, with all that are required."""
    if unknown := sorted(values.keys() - METRICS.keys()):
        raise InvalidInputError(f"metrics: got {', '.join(unknown)}, wanted only what quant_spec.metrics has a row for")
    if names := missing(values):
        raise InvalidInputError(f"metrics: got none of {', '.join(names)}, wanted all that are required of a release")


def lines(place: Place, values: Values) -> dict[str, tuple[str, ...]]:
    """Return what a place shows of a release: names of metrics to label and texts, in the place's order.

    Metrics that the release does not have are left out.
    """
    found = [
        (shown.rank, name, shown)
        for name, metric in METRICS.items()
        if values.get(name) is not None and (shown := metric.places.get(place)) is not None
    ]
    return {
        name: (shown.label.format_map(values), *_texts(place, name, shown, values))
        for _, name, shown in sorted(found, key=lambda entry: entry[0])
    }


def _texts(place: Place, name: str, shown: Shown, values: Values) -> tuple[str, ...]:
    return METRICS[name].plain_texts(place, values[name]) if shown.texts is None else shown.texts(values)


def headings(place: Place) -> dict[str, str]:
    """Return the metrics that a place has a column for, with its heading, in the place's order."""
    found = [(shown.rank, name, shown) for name, each in METRICS.items() if (shown := each.places.get(place))]
    return {name: shown.label for _, name, shown in sorted(found, key=lambda entry: entry[0])}


def protocol(listing: Listing, values: Values) -> dict[str, Any]:
    """Return the entries of the protocol that are listed, and those that this table does not know."""
    return {name: value for name, value in values.items() if name not in METRICS or listing in METRICS[name].listed}


def numbers(values: Values) -> dict[str, float]:
    """Return the metrics that are single numbers."""
    return {name: values[name] for name in values if name in METRICS and METRICS[name].is_number}
