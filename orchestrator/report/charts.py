"""Charts as inline SVG: a line over steps, columns over layers. Plain text, so a report needs no script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from orchestrator.report.svg import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Scale,
    nice_ticks,
    svg,
    text,
    title,
    x_label,
    y_axis,
)


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a chart: its value, the CSS class that colours it, and what hovering shows."""

    value: float
    css_class: str
    title: str


def line_chart(values: Sequence[float], *, x_name: str, y_name: str) -> str:
    """Draw one line over 0, 1, 2, …; values that are not finite leave a gap.

    Returns
    -------
    str
        An `<svg>` element, or an empty text if there is nothing to draw.
    """
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    ticks = nice_ticks(min(finite), max(finite))
    y = Scale(ticks[0], ticks[-1], HEIGHT - BOTTOM, TOP)
    x = Scale(0, max(len(values) - 1, 1), LEFT + 10, WIDTH - RIGHT - 10)
    parts = y_axis([(tick, f"{tick:g}") for tick in ticks], y, y_name)
    stride = max(1, math.ceil(len(values) / 21))
    parts += [
        text(x(index), HEIGHT - BOTTOM + 16, str(index), "axis middle") for index in range(0, len(values), stride)
    ]
    parts.append(x_label(x_name, HEIGHT - 4))
    for run in _runs(values):
        points = " ".join(f"{x(index):.1f},{y(value):.1f}" for index, value in run)
        parts.append(f'<polyline class="line" points="{points}"/>')
        for index, value in run:
            words = title(f"step {index}: {value:.2f}")
            parts.append(f'<circle class="dot" cx="{x(index):.1f}" cy="{y(value):.1f}" r="3">{words}</circle>')
    return svg(parts, f"{y_name} over {x_name}")


def column_chart(columns: Sequence[Column], *, x_name: str, y_name: str) -> str:
    """Draw columns from the axis up, in the order given; a value that is not finite has none.

    Returns
    -------
    str
        An `<svg>` element, or an empty text if there is nothing to draw.
    """
    finite = [column.value for column in columns if math.isfinite(column.value)]
    if not finite:
        return ""
    ticks = nice_ticks(min(0.0, *finite), max(finite))
    y = Scale(ticks[0], ticks[-1], HEIGHT - BOTTOM, TOP)
    pitch = (WIDTH - RIGHT - LEFT) / len(columns)
    width = max(min(pitch * 0.8, 40), 1)
    parts = y_axis([(tick, f"{tick:g}") for tick in ticks], y, y_name)
    parts.append(x_label(x_name, HEIGHT - BOTTOM + 18))
    for index, column in enumerate(columns):
        if math.isfinite(column.value):
            top, base = sorted((y(column.value), y(max(ticks[0], 0.0))))
            left = LEFT + pitch * (index + 0.5) - width / 2
            parts.append(
                f'<rect class="{escape(column.css_class)}" x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" '
                f'height="{base - top:.1f}">{title(column.title)}</rect>'
            )
    return svg(parts, f"{y_name} of each of {len(columns)} {x_name}")


def _runs(values: Sequence[float]) -> list[list[tuple[int, float]]]:
    """Split at values that are not finite."""
    runs: list[list[tuple[int, float]]] = [[]]
    for index, value in enumerate(values):
        if math.isfinite(value):
            runs[-1].append((index, value))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]
