"""Charts as inline SVG: a line over steps, columns over layers. Plain text, so a report needs no script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 1040, 260
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 40
_TICKS = 5


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a chart: its value, the CSS class that colours it, and what hovering shows."""

    value: float
    css_class: str
    title: str


@dataclass(frozen=True, slots=True)
class _Scale:
    """A linear map from [low, high] to pixels; y grows downwards."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def nice_ticks(low: float, high: float) -> list[float]:
    """Return about five round numbers that enclose [low, high].

    Parameters
    ----------
    low, high
        Finite; if they are equal, a unit range around them is taken.
    """
    if not low < high:
        low, high = low - 0.5, high + 0.5
    raw = (high - low) / (_TICKS - 1)
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * index, 10) for index in range(first, last + 1)]


def line_chart(values: Sequence[float], *, x_label: str, y_label: str) -> str:
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
    y = _Scale(ticks[0], ticks[-1], HEIGHT - BOTTOM, TOP)
    x = _Scale(0, max(len(values) - 1, 1), LEFT + 10, WIDTH - RIGHT - 10)
    parts = _y_axis(ticks, y, y_label)
    stride = max(1, math.ceil(len(values) / 21))
    parts += [_x_tick(x(index), str(index)) for index in range(0, len(values), stride)]
    parts.append(_text((LEFT + WIDTH) / 2, HEIGHT - 4, x_label, "axis middle"))
    for run in _runs(values):
        points = " ".join(f"{x(index):.1f},{y(value):.1f}" for index, value in run)
        parts.append(f'<polyline class="line" points="{points}"/>')
        for index, value in run:
            title = f"step {index}: {value:.2f}"
            parts.append(f'<circle class="dot" cx="{x(index):.1f}" cy="{y(value):.1f}" r="3">{_title(title)}</circle>')
    return _svg(parts, f"{y_label} over {x_label}")


def column_chart(columns: Sequence[Column], *, x_label: str, y_label: str) -> str:
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
    y = _Scale(ticks[0], ticks[-1], HEIGHT - BOTTOM, TOP)
    pitch = (WIDTH - RIGHT - LEFT) / len(columns)
    width = max(min(pitch * 0.8, 40), 1)
    parts = _y_axis(ticks, y, y_label)
    parts.append(_text((LEFT + WIDTH) / 2, HEIGHT - BOTTOM + 18, x_label, "axis middle"))
    for index, column in enumerate(columns):
        if math.isfinite(column.value):
            top, base = sorted((y(column.value), y(max(ticks[0], 0.0))))
            left = LEFT + pitch * (index + 0.5) - width / 2
            parts.append(
                f'<rect class="{escape(column.css_class)}" x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" '
                f'height="{base - top:.1f}">{_title(column.title)}</rect>'
            )
    return _svg(parts, f"{y_label} of each of {len(columns)} {x_label}")


def _runs(values: Sequence[float]) -> list[list[tuple[int, float]]]:
    """Split at values that are not finite."""
    runs: list[list[tuple[int, float]]] = [[]]
    for index, value in enumerate(values):
        if math.isfinite(value):
            runs[-1].append((index, value))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _y_axis(ticks: Sequence[float], y: _Scale, label: str) -> list[str]:
    parts = []
    for tick in ticks:
        height = y(tick)
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{height:.1f}" y2="{height:.1f}"/>')
        parts.append(_text(LEFT - 6, height + 4, f"{tick:g}", "axis end"))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    turn = f"rotate(-90 12 {middle:.1f})"
    parts.append(f'<text class="axis middle" x="12" y="{middle:.1f}" transform="{turn}">{escape(label)}</text>')
    return parts


def _x_tick(x: float, label: str) -> str:
    return _text(x, HEIGHT - BOTTOM + 16, label, "axis middle")


def _text(x: float, y: float, text: str, css_class: str) -> str:
    return f'<text class="{css_class}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def _title(text: str) -> str:
    return f"<title>{escape(text)}</title>"


def _svg(parts: Sequence[str], description: str) -> str:
    body = "".join(parts)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(description)}">{body}</svg>'
