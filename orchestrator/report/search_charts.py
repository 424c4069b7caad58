"""The charts of a search's report: points in the plane of size and quality, predictions, sensitivities."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from orchestrator.actions.sensitivity import KEEP, Sensitivities, share_text
from orchestrator.report.plane import Axis, Mark, Trace, plane_chart
from orchestrator.report.search_data import ModelReport, PointRow
from quant_spec.enums import Objective
from quant_spec.numbers import human_bytes

#: What marks are called in the key of the first chart: class, shape, words.
KEY = (
    ("release", "star", "published as a release"),
    ("front", "circle", "on the measured front"),
    ("beaten", "circle", "measured in full, beaten"),
    ("screened", "circle", "measured with few seeds only"),
    ("uniform", "square", "uniform bits"),
    ("paper", "diamond", "a paper's own allocation"),
)


@dataclass(frozen=True, slots=True)
class Quality:
    """What the vertical axis shows: its name, a point's value, and the half of its interval."""

    name: str
    value: Callable[[PointRow], float | None]
    interval: Callable[[PointRow], float | None]


PSNR = Quality("PSNR, dB", lambda point: point.psnr_db, lambda point: point.psnr_db_ci95)
FD = Quality("Fréchet distance (lower is better)", lambda point: point.fd, lambda _: None)
ERROR = Quality(
    "prediction error, -dB",
    lambda point: -10 * math.log10(point.error) if point.error else None,
    lambda _: None,
)


def qualities(objective: str, points: Sequence[PointRow]) -> list[Quality]:
    """Return what is worth a chart: PSNR where it was measured or nothing was, and the objective where it was."""
    other = {Objective.FD: FD, Objective.PREDICTION_ERROR: ERROR}.get(Objective(objective))
    found = [each for each in (PSNR, other) if each and any(each.value(point) is not None for point in points)]
    return found or [PSNR]


def dialog_id(model: int, point: PointRow) -> str:
    """Return the id of what a click on a point opens."""
    return f"m{model}-p{point.number}"


def pareto_chart(index: int, model: ModelReport, quality: Quality, budgets: Sequence[int]) -> str:
    """Draw one model's points, bytes against quality, over the predicted front and the measured one.

    Parameters
    ----------
    index
        Of the model, from 0; part of what a click opens.
    budgets
        Limits in bytes, drawn as guides.
    """
    marks = [
        Mark(
            x=float(point.bytes),
            y=value,
            shape=_look(point)[1],
            css_class=_look(point)[0] + ("" if point.on_front or not point.is_final else " off"),
            tip=point_tip(point),
            target=dialog_id(index, point),
            label=point.label if point.release or point.is_uniform or point.is_papers else "",
            whisker=quality.interval(point) if point.is_final else None,
            radius=6.0 if point.is_final else 3.5,
        )
        for point in sorted(model.points, key=_depth)
        if point.bytes is not None and (value := quality.value(point)) is not None
    ]
    if not marks and not model.front:
        return ""
    traces = []
    if quality is PSNR:
        predicted = [(size, psnr_db) for size, _, psnr_db in model.front if math.isfinite(psnr_db)]
        traces.append(Trace(predicted, "predicted"))
    front = [
        (float(point.bytes), value)
        for point in model.front_points
        if point.bytes is not None and (value := quality.value(point)) is not None
    ]
    traces.append(Trace(_staircase(front), "measured"))
    sizes = [mark.x for mark in marks] + [size for size, _, _ in model.front]
    guides = [(float(each), human_bytes(each, 2)) for each in budgets if min(sizes) <= each <= 1.1 * max(sizes)]
    axis = Axis("bytes of the packed file", _size_text, log=max(sizes) > 8 * min(sizes))
    return plane_chart(marks, axis, Axis(quality.name), traces=traces, guides=guides)


def point_tip(point: PointRow) -> str:
    """Return what hovering over a point says: what it is, its size, its quality."""
    parts = [f"point {point.number}: {point.label}"]
    if point.release:
        parts.append(point.origin_text)
    parts += [human_bytes(point.bytes, 2)] if point.bytes is not None else []
    parts += [f"{point.bits_mean:.2f} bits"] if point.bits_mean is not None else []
    if point.psnr_db is not None:
        interval = f" ± {point.psnr_db_ci95:.2f}" if point.psnr_db_ci95 is not None else ""
        parts.append(f"{point.psnr_db:.2f}{interval} dB")
    parts += [f"FD {point.fd:.3g}"] if point.fd is not None else []
    parts += [f"{point.n} seeds"] if point.n is not None else []
    parts += [point.dropped] if point.dropped else []
    return ", ".join(parts)


def _look(point: PointRow) -> tuple[str, str]:
    """Return class and shape of a point's mark."""
    if point.release:
        return KEY[0][:2]
    if point.is_uniform:
        return KEY[4][:2]
    if point.is_papers:
        return KEY[5][:2]
    if not point.is_final:
        return KEY[3][:2]
    return KEY[1][:2] if point.on_front else KEY[2][:2]


def _depth(point: PointRow) -> tuple[bool, bool, bool, int]:
    """Order marks so that what matters most is drawn last, on top."""
    return point.release is not None, point.is_final, point.on_front, point.bytes or 0


def _staircase(front: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the border of what a front beats: a file of so many bytes is as good as the last point before it."""
    corners: list[tuple[float, float]] = []
    for at, value in front:
        if corners:
            corners.append((at, corners[-1][1]))
        corners.append((at, value))
    return corners


def _size_text(count: float) -> str:
    """Return the number of a tick, without decimals that say nothing."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:g} {unit}"
    return f"{count:g} B"


_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def _power_text(value: float) -> str:
    """Return the number of a logarithmic tick: `10⁻⁴`, `5·10⁻⁴`."""
    factor, _, power = f"{value:.0e}".partition("e")
    text = "10" + str(int(power)).translate(_SUPERSCRIPTS)
    return text if factor == "1" else f"{factor}·{text}"


@dataclass(frozen=True, slots=True)
class Agreement:
    """How well predictions order and hit what was measured.

    `rank` is Spearman's correlation of predicted and measured quality, `damage_rank` that of the table's damage alone
    with the measured error, both None below three points; `rms_db` is the distance of predicted and measured PSNR.
    """

    n: int
    rank: float | None
    damage_rank: float | None
    rms_db: float | None


def agreement(points: Sequence[PointRow]) -> Agreement:
    """Compare predictions with measurements, over the points that have both."""
    pairs = _pairs(points)
    damages = [
        (damage, -point.psnr_db)
        for point in points
        if point.psnr_db is not None and (damage := point.predicted.get("damage")) is not None
    ]
    rms = math.sqrt(sum((x - y) ** 2 for x, y, _ in pairs) / len(pairs)) if pairs else None
    return Agreement(
        max(len(pairs), len(damages)), rank_correlation([pair[:2] for pair in pairs]), rank_correlation(damages), rms
    )


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Return Spearman's correlation; None below three pairs, or where one side is all the same."""
    if len(pairs) < 3 or any(len(set(side)) < 2 for side in zip(*pairs, strict=True)):
        return None
    from scipy.stats import spearmanr

    return float(spearmanr([x for x, _ in pairs], [y for _, y in pairs]).statistic)


def _pairs(points: Sequence[PointRow]) -> list[tuple[float, float, PointRow]]:
    """Return predicted and measured PSNR of the points that have both."""
    return [
        (predicted, point.psnr_db, point)
        for point in points
        if point.psnr_db is not None and (predicted := point.predicted.get("psnr_db")) is not None
    ]


def prediction_chart(index: int, model: ModelReport) -> str:
    """Draw measured against predicted PSNR; on the diagonal they are equal."""
    pairs = _pairs(model.points)
    if not pairs:
        return ""
    marks = [
        Mark(
            x=predicted,
            y=measured,
            shape=_look(point)[1],
            css_class=_look(point)[0],
            tip=f"{point_tip(point)}; predicted {predicted:.2f} dB",
            target=dialog_id(index, point),
            radius=5.0 if point.is_final else 3.5,
        )
        for predicted, measured, point in pairs
    ]
    ends = [min(x for x, _, _ in pairs), max(x for x, _, _ in pairs)]
    diagonal = Trace([(end, end) for end in ends], "predicted")
    axes = (Axis("predicted PSNR, dB"), Axis("measured PSNR, dB"))
    return plane_chart(marks, *axes, traces=[diagonal], height=360)


def sensitivity_chart(found: Sensitivities) -> str:
    """Draw the damage of each layer's weights at each width, layers in order, damage in the logarithm."""
    totals = {label: found.damage_at(label) for label in found.labels}
    marks = [
        Mark(
            x=float(place),
            y=option.damage,
            shape="circle",
            css_class=f"bits{int(option.width)}",
            tip=f"{layer.name}, {option.label} bits: damage {option.damage:.3g}, "
            f"{share_text(option.damage, totals[option.label])} of all layers at {option.label}",
            radius=3.5,
        )
        for place, layer in enumerate(found.layers)
        for option in layer.weights
        if option.label != KEEP and "+" not in option.label and option.damage > 0
    ]
    return plane_chart(marks, Axis("layers, first to last"), Axis("damage", _power_text, log=True), height=320)
