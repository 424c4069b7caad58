"""The report's data as one HTML page: numbers for people, charts, and the template that holds them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from orchestrator.report.charts import Column, column_chart, line_chart
from orchestrator.report.data import CorrectionRow, FeatureRow, LayerRow, ReportData, UnitRow
from orchestrator.text import human_bytes, human_count, human_seconds

_FOLDER = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Figure:
    """One number at the top of the page."""

    name: str
    value: str
    more: str = ""


@dataclass(frozen=True, slots=True)
class SizeRow:
    """One line of the comparison with the original."""

    name: str
    ours: str
    original: str
    ratio: str


def render_report(data: ReportData) -> str:
    """Return the report as one HTML text without references to anything outside it."""
    environment = Environment(loader=FileSystemLoader(_FOLDER), autoescape=True, undefined=StrictUndefined)
    environment.filters |= {"duration": human_seconds, "millions": human_count}
    return environment.get_template("template.html").render(
        data=data,
        style=Markup((_FOLDER / "style.css").read_text(encoding="utf-8")),
        figures=key_figures(data),
        protocol_line=protocol_line(data.metrics),
        sizes=size_rows(data.metrics),
        step_chart=Markup(_step_chart(data.metrics)),
        layer_chart=Markup(_layer_chart(data.layers)),
        unit_chart=Markup(_unit_chart(data.units)),
        feature_chart=Markup(_feature_chart(data.features)),
        step_bits_chart=Markup(_step_bits_chart(data.step_bits)),
        correction_chart=Markup(_correction_chart(data.corrections)),
        bit_classes=bit_classes(data.layers),
        longest=max((kind.seconds for kind in data.kinds), default=0.0) or 1.0,
    )


def key_figures(data: ReportData) -> list[Figure]:
    """Return the numbers at the top."""
    metrics = data.metrics
    sqnr = [value for value in metrics["sqnr_db_per_step"] if math.isfinite(value)]
    return [
        Figure(
            "PSNR, same seeds",
            f"{metrics['psnr_db']:.2f} dB",
            f"± {metrics['psnr_db_ci95']:.2f} (95 %), n = {metrics['n']}",
        ),
        Figure("SQNR, worst step", f"{min(sqnr):.1f} dB" if sqnr else "–", "of the prediction"),
        Figure("Fréchet distance", f"{metrics['fd']:.3g}", str(metrics["fd_extractor"]).partition("-imagenet")[0]),
        Figure(
            "Weights",
            human_bytes(metrics["bytes"]),
            f"{metrics['bytes_fp16'] / metrics['bytes']:.2f}× under fp16",
        ),
        Figure(
            "Mean bits", f"{metrics['weight_bits_mean']:.2f} / {metrics['act_bits_mean']:.2f}", "weights / activations"
        ),
        Figure("Bit operations", f"{metrics['bops_fp32'] / metrics['bops']:.1f}×", "fewer than fp32"),
    ]


def protocol_line(metrics: Mapping[str, Any]) -> str:
    """Return what the figures were measured with, in one sentence."""
    sampler, seeds = metrics["sampler"], metrics["seeds"]
    scheduler = sampler["scheduler"] or "the model's own sampler"
    guidance = "" if sampler["guidance_scale"] == 1 else f", guidance {sampler['guidance_scale']:g}"
    latents = ", latents compared as they are" if metrics.get("samples") == "latents" else ""
    return (
        f"Measured on the packed file, loaded again: {scheduler}, "
        f"{sampler['num_inference_steps']} steps, eta {sampler['eta']:g}{guidance}, "
        f"seeds {seeds['first']} to {seeds['first'] + seeds['count'] - 1}{latents}."
    )


def size_rows(metrics: Mapping[str, Any]) -> list[SizeRow]:
    """Return the comparison with the original: size and bit operations."""
    size, half = metrics["bytes"], metrics["bytes_fp16"]
    bops, bops_fp32 = metrics["bops"], metrics["bops_fp32"]
    return [
        SizeRow("weights, against fp16", human_bytes(size), human_bytes(half), f"{half / size:.2f}×"),
        SizeRow("weights, against fp32", human_bytes(size), human_bytes(2 * half), f"{2 * half / size:.2f}×"),
        SizeRow(
            "bit operations of one forward",
            human_count(bops),
            f"{human_count(bops_fp32)} (fp32)",
            f"{bops_fp32 / bops:.2f}×",
        ),
        SizeRow(
            "bits of a weight, mean",
            f"{metrics['weight_bits_mean']:.2f}",
            "32",
            f"{32 / metrics['weight_bits_mean']:.2f}×",
        ),
        SizeRow(
            "bits of an activation, mean",
            f"{metrics['act_bits_mean']:.2f}",
            "32",
            f"{32 / metrics['act_bits_mean']:.2f}×",
        ),
    ]


def bit_classes(layers: Sequence[LayerRow]) -> list[tuple[str, str]]:
    """Return the key of the layer chart: what the layers' weight bits are called, and their CSS classes."""
    bits = sorted(
        {layer.weight_bits for layer in layers if layer.weight_bits is not None and layer.sqnr_db is not None}
    )
    return [(f"{each} bit weights", _css_class(each)) for each in bits]


def _css_class(bits: int | None) -> str:
    if bits is None:
        return "before"
    return f"bits{bits}"


def _step_chart(metrics: Mapping[str, Any]) -> str:
    return line_chart(metrics["sqnr_db_per_step"], x_label="step of the sampler", y_label="SQNR, dB")


def _layer_chart(layers: Sequence[LayerRow]) -> str:
    columns = [
        Column(layer.sqnr_db, _css_class(layer.weight_bits), _layer_title(layer))
        for layer in layers
        if layer.sqnr_db is not None
    ]
    return column_chart(columns, x_label="layers, first to last", y_label="SQNR, dB")


def _layer_title(layer: LayerRow) -> str:
    act = "float" if layer.act_bits is None else f"A{layer.act_bits}"
    return f"{layer.name}: W{layer.weight_bits} {act}, {layer.sqnr_db:.1f} dB"


def _feature_chart(features: Sequence[FeatureRow]) -> str:
    """Draw two columns for each temporal feature."""
    columns = []
    for each in features:
        columns.append(Column(each.start_db, "before", f"{each.name}, weights rounded: {each.start_db:.1f} dB"))
        title = f"{each.name}, from its {each.served}: {each.end_db:.1f} dB, cosine {each.cosine:.6f}"
        columns.append(Column(each.end_db, "after", title))
    return column_chart(columns, x_label="temporal features, first to last", y_label="SQNR, dB")


def _step_bits_chart(bits: Sequence[int]) -> str:
    columns = [Column(float(each), _css_class(each), f"step {step}: {each} bits") for step, each in enumerate(bits)]
    return column_chart(columns, x_label="steps of the sampler, noisiest first", y_label="activation bits")


def _correction_chart(steps: Sequence[CorrectionRow]) -> str:
    columns = [Column(step.gain_db, "after", _correction_title(at, step)) for at, step in enumerate(steps)]
    return column_chart(columns, x_label="steps of the sampler, noisiest first", y_label="held-out error, -dB")


def _correction_title(at: int, step: CorrectionRow) -> str:
    used = " and ".join(name for name, uses in (("k", step.uses_k), ("bias", step.uses_bias)) if uses) or "nothing"
    return f"step {at}: k {step.k:.5f}, r² {step.r2:.4f}; uses {used}; error {step.gain_db:.3f} dB lower"


def _unit_chart(units: Sequence[UnitRow]) -> str:
    """Draw two columns for each unit that was reconstructed."""
    columns = []
    for unit in units:
        pair = (("before", "before", unit.before_db), ("after", "after reconstruction", unit.after_db))
        columns += [Column(value, css, f"{unit.name}, {when}: {value:.1f} dB") for css, when, value in pair]
    return column_chart(columns, x_label="units, first to last", y_label="SQNR, dB")
