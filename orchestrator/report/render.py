"""The report's data as one HTML page: numbers for people, charts, and the template that holds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from orchestrator.report.charts import Column, column_chart, line_chart
from orchestrator.report.data import CorrectionRow, FeatureRow, LayerRow, ReportData, UnitRow
from orchestrator.text import human_seconds
from quant_spec.layer_bits import LayerBits, nearest_width
from quant_spec.metrics import Place, lines
from quant_spec.numbers import human_count

_FOLDER = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class StepChart:
    """A metric over the steps of the sampler: what is above its chart, what is said of it, and the chart."""

    heading: str
    note: str
    chart: Markup


def render_report(data: ReportData) -> str:
    """Return the report as one HTML text without references to anything outside it."""
    environment = Environment(loader=FileSystemLoader(_FOLDER), autoescape=True, undefined=StrictUndefined)
    environment.filters |= {"duration": human_seconds, "millions": human_count}
    return environment.get_template("template.html").render(
        data=data,
        style=Markup((_FOLDER / "style.css").read_text(encoding="utf-8")),
        figures=list(lines(Place.REPORT, data.metrics).values()),
        protocol_line=protocol_line(data.metrics),
        costs=list(lines(Place.COST, data.metrics).values()),
        step_charts=step_charts(data.metrics),
        layer_chart=Markup(_layer_chart(data.layers)),
        unit_chart=Markup(_unit_chart(data.units)),
        feature_chart=Markup(_feature_chart(data.features)),
        step_bits_chart=Markup(_step_bits_chart(data.step_bits)),
        correction_chart=Markup(_correction_chart(data.corrections)),
        bit_classes=bit_classes(data.layers),
        longest=max((kind.seconds for kind in data.kinds), default=0.0) or 1.0,
    )


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


def step_charts(metrics: Mapping[str, Any]) -> list[StepChart]:
    """Draw the metrics that have a value for each step; those without any are left out."""
    found = []
    for name, (heading, axis, note) in lines(Place.STEPS, metrics).items():
        chart = line_chart(metrics[name], x_name="step of the sampler", y_name=axis)
        if chart:
            found.append(StepChart(heading, note, Markup(chart)))
    return found


def bit_classes(layers: Sequence[LayerRow]) -> list[tuple[str, str]]:
    """Return the key of the layer chart: what the layers' weight bits are called, and their CSS classes.

    Layers whose channels differ have the colour of the width that is nearest to their mean.
    """
    mixed: dict[int, bool] = {}
    for layer in layers:
        if layer.sqnr_db is not None and layer.bits is not None and layer.bits.weights is not None:
            width = nearest_width(layer.bits.weights)
            mixed[width] = mixed.get(width, False) or bool(layer.bits.mixture)
    return [
        (f"{'about ' if is_mixed else ''}{width} bit weights", f"bits{width}")
        for width, is_mixed in sorted(mixed.items())
    ]


def _css_class(bits: float | None) -> str:
    return "before" if bits is None else f"bits{nearest_width(bits)}"


def _layer_chart(layers: Sequence[LayerRow]) -> str:
    columns = [
        Column(layer.sqnr_db, _css_class(layer.bits.weights if layer.bits else None), _layer_title(layer))
        for layer in layers
        if layer.sqnr_db is not None
    ]
    return column_chart(columns, x_name="layers, first to last", y_name="SQNR, dB")


def _layer_title(layer: LayerRow) -> str:
    bits = layer.bits or LayerBits()
    words = bits.weights_text or "float"
    if bits.weights is not None:
        activations = "float" if bits.activations is None else f"A{bits.activations_text}"
        words = f"W{words} {activations}"
    return f"{layer.name}: {words}, {layer.sqnr_db:.1f} dB"


def _feature_chart(features: Sequence[FeatureRow]) -> str:
    """Draw two columns for each temporal feature."""
    columns = []
    for each in features:
        columns.append(Column(each.start_db, "before", f"{each.name}, weights rounded: {each.start_db:.1f} dB"))
        title = f"{each.name}, from its {each.served}: {each.end_db:.1f} dB, cosine {each.cosine:.6f}"
        columns.append(Column(each.end_db, "after", title))
    return column_chart(columns, x_name="temporal features, first to last", y_name="SQNR, dB")


def _step_bits_chart(bits: Sequence[int]) -> str:
    columns = [Column(float(each), _css_class(each), f"step {step}: {each} bits") for step, each in enumerate(bits)]
    return column_chart(columns, x_name="steps of the sampler, noisiest first", y_name="activation bits")


def _correction_chart(steps: Sequence[CorrectionRow]) -> str:
    columns = [Column(step.gain_db, "after", _correction_title(at, step)) for at, step in enumerate(steps)]
    return column_chart(columns, x_name="steps of the sampler, noisiest first", y_name="held-out error, -dB")


def _correction_title(at: int, step: CorrectionRow) -> str:
    used = " and ".join(name for name, uses in (("k", step.uses_k), ("bias", step.uses_bias)) if uses) or "nothing"
    return f"step {at}: k {step.k:.5f}, r² {step.r2:.4f}; uses {used}; error {step.gain_db:.3f} dB lower"


def _unit_chart(units: Sequence[UnitRow]) -> str:
    """Draw two columns for each unit that was reconstructed."""
    columns = []
    for unit in units:
        pair = (("before", "before", unit.before_db), ("after", "after reconstruction", unit.after_db))
        columns += [Column(value, css, f"{unit.name}, {when}: {value:.1f} dB") for css, when, value in pair]
    return column_chart(columns, x_name="units, first to last", y_name="SQNR, dB")
