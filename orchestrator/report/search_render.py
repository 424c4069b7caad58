"""A search's report as one HTML page: charts, heat maps, tables, and a small script for hovering and clicking."""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from orchestrator.actions.sensitivity import (
    LayerSensitivity,
    Sensitivities,
    Step,
    input_costs,
    next_steps,
    share_text,
    smallest_within,
    spare_steps,
    total_bytes,
)
from orchestrator.report.heat_map import HeatMap, activations_map, weights_map
from orchestrator.report.search_charts import (
    KEY,
    Agreement,
    agreement,
    dialog_id,
    pareto_chart,
    point_tip,
    prediction_chart,
    qualities,
    sensitivity_chart,
)
from orchestrator.report.search_data import ModelReport, PointRow, SearchReportData
from orchestrator.text import human_seconds
from quant_spec.numbers import human_bytes, human_count

_FOLDER = Path(__file__).parent
#: Layers in the tables of steps; all of them are in the table that is folded.
_MOST_STEPS = 20


@dataclass(frozen=True, slots=True)
class SensitivityView:
    """What a report says of one table: from which choice steps start, its chart, the steps, all layers."""

    start: str
    labels: tuple[str, ...]
    layers: tuple[LayerSensitivity, ...]
    damage: float
    weights: int
    totals: tuple[tuple[str, float, int], ...]
    chart: Markup
    ups: tuple[Step, ...]
    downs: tuple[Step, ...]
    inputs: tuple[tuple[LayerSensitivity, str, float], ...]
    inputs_damage: float


@dataclass(frozen=True, slots=True)
class ModelView:
    """One model with its charts, ready for the template; `references` are full-precision samples, each once, by id."""

    index: int
    model: ModelReport
    charts: tuple[Markup, ...]
    prediction: Markup
    agreement: Agreement
    weights: HeatMap | None
    activations: HeatMap | None
    sensitivity: SensitivityView | None
    smallest: tuple[tuple[float, int], ...]
    points: tuple[PointRow, ...]
    dropped: tuple[PointRow, ...]
    best: str
    references: Mapping[str, str]

    def dialog(self, point: PointRow) -> str:
        """Return the id of what a click on a point opens."""
        return dialog_id(self.index, point)

    @property
    def releases(self) -> list[str]:
        """Names of the releases."""
        return [point.release for point in self.points if point.release]

    @property
    def validated(self) -> int:
        """Points of the search that were measured with the full protocol."""
        return sum(point.is_final for point in self.points)


def render_search(data: SearchReportData) -> str:
    """Return the report as one HTML text without references to anything outside it."""
    environment = Environment(loader=FileSystemLoader(_FOLDER), autoescape=True, undefined=StrictUndefined)
    environment.filters |= {
        "duration": human_seconds,
        "size": lambda count: "–" if count is None else human_bytes(count, 2),
        "count": lambda count: "–" if count is None else human_count(count),
        "decimal": lambda value, places: "–" if value is None else f"{value:.{places}f}",
        "small": lambda value: "–" if value is None else f"{value:.3g}",
        "allocated": allocation_text,
        "tip": point_tip,
    }
    environment.globals |= {"share": share_text}
    script = (_FOLDER / "search.js").read_text(encoding="utf-8")
    return environment.get_template("search.html").render(
        data=data,
        style=Markup((_FOLDER / "style.css").read_text(encoding="utf-8")),
        more_style=Markup((_FOLDER / "search.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        models=[_model_view(index, model, data) for index, model in enumerate(data.models)],
        key=KEY,
        saved=share_text(data.saved_seconds, data.seconds + data.saved_seconds),
    )


def _model_view(index: int, model: ModelReport, data: SearchReportData) -> ModelView:
    points = tuple(sorted(model.points, key=lambda point: (point.bytes is None, point.bytes or 0, point.number)))
    drawn = [
        pareto_chart(index, model, quality, data.byte_budgets) for quality in qualities(data.objective, model.points)
    ]
    front = model.front_points
    return ModelView(
        index=index,
        model=model,
        charts=tuple(Markup(chart) for chart in drawn if chart),
        prediction=Markup(prediction_chart(index, model)),
        agreement=agreement(model.points),
        weights=weights_map(model.layers, front),
        activations=activations_map(model.layers, front),
        sensitivity=_sensitivity_view(model.sensitivities) if model.sensitivities is not None else None,
        smallest=tuple(smallest_within(model.front)),
        points=points,
        dropped=tuple(point for point in points if point.dropped),
        best=_best(front),
        references={
            source: f"m{index}-reference-{place}"
            for place, source in enumerate(dict.fromkeys(point.grid.reference for point in points if point.grid))
        },
    )


def _best(front: Sequence[PointRow]) -> str:
    """Return the ends of a front: `1.60 MB 31.2 dB … 4.10 MB 48.0 dB`."""
    ends = [front[0], front[-1]] if len(front) > 1 else list(front)
    return " … ".join(
        f"{human_bytes(point.bytes or 0, 2)}" + (f" {point.psnr_db:.1f} dB" if point.psnr_db is not None else "")
        for point in ends
    )


def _sensitivity_view(found: Sensitivities) -> SensitivityView:
    start = found.middle
    inputs = input_costs(found)
    return SensitivityView(
        start=start,
        labels=found.labels,
        layers=found.layers,
        damage=found.damage_at(start),
        weights=sum(layer.parameters for layer in found.layers),
        totals=tuple((label, found.damage_at(label), total_bytes(found, label)) for label in found.labels),
        chart=Markup(sensitivity_chart(found)),
        ups=tuple(next_steps(found, start)[:_MOST_STEPS]),
        downs=tuple(spare_steps(found, start)[:_MOST_STEPS]),
        inputs=tuple(inputs[:_MOST_STEPS]),
        inputs_damage=sum(damage for _, _, damage in inputs),
    )


def allocation_text(point: PointRow) -> str:
    """Return how many layers a point gives which bits: `12 layers at 8, 40 at 4, 3 kept`."""
    counts: Counter[str] = Counter()
    for choice in point.allocation.layers.values():
        if choice.keep:
            counts["in full precision"] += 1
        elif choice.weight_bits is not None:
            counts[f"at {choice.weight_bits}{'+' if choice.promoted else ''}"] += 1
    words = [f"{count} {name}" for name, count in sorted(counts.items(), key=lambda each: each[0])]
    variant = "" if point.allocation.variant == "base" else f"variant {point.allocation.variant}; "
    return variant + ("layers: " + ", ".join(words) if words else "as the base recipe")
