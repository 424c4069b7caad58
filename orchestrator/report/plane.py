"""A chart of points in a plane, as inline SVG: marks that hovering names and that a click opens, lines, and guides."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from orchestrator.report.svg import (
    BOTTOM,
    RIGHT,
    TOP,
    WIDTH,
    Scale,
    log_ticks,
    nice_ticks,
    rule,
    svg,
    text,
    x_label,
    y_axis,
)

_HEIGHT = 420.0
#: Round numbers along an axis, about.
_TICKS = 8
#: Pixels of the left margin, and the share of an axis that is free on both sides of what is drawn.
_LEFT, _ROOM = 66.0, 0.04
#: Pixels: half of a mark, the room that a letter of a label takes, and a label's height.
_RADIUS, _LETTER, _LINE = 5.5, 6.4, 14.0


@dataclass(frozen=True, slots=True)
class Mark:
    """A point: where, how it looks, what hovering says, and the id of what a click opens ("" opens nothing).

    `shape` is `circle`, `square`, `diamond` or `star`; `whisker` is the half of an interval along y. A `label` stands
    beside it where there is room.
    """

    x: float
    y: float
    shape: str
    css_class: str
    tip: str
    target: str = ""
    label: str = ""
    whisker: float | None = None
    radius: float = _RADIUS


@dataclass(frozen=True, slots=True)
class Trace:
    """A line through points in order."""

    points: Sequence[tuple[float, float]]
    css_class: str


@dataclass(frozen=True, slots=True)
class Axis:
    """An axis: its name, how its numbers are written, and whether it is logarithmic (its values are then above 0)."""

    name: str
    number: Callable[[float], str] = "{:g}".format
    log: bool = False

    def scale(self, values: Sequence[float], start: float, end: float) -> Scale:
        """Return a map of the values, and a little more on both sides, to pixels."""
        low, high = min(values), max(values)
        if self.log:
            room = max((high / low) ** _ROOM, 1.1)
            return Scale(low / room, high * room, start, end, log=True)
        room = _ROOM * (high - low) or 0.5
        return Scale(low - room, high + room, start, end)

    def ticks(self, scale: Scale) -> list[tuple[float, str]]:
        """Return round numbers within a scale, and their texts."""
        ticks = log_ticks(scale.low, scale.high) if self.log else nice_ticks(scale.low, scale.high, _TICKS)
        return [(tick, self.number(tick)) for tick in ticks if scale.low <= tick <= scale.high]


def plane_chart(
    marks: Sequence[Mark],
    x_axis: Axis,
    y_axis_: Axis,
    *,
    traces: Sequence[Trace] = (),
    guides: Sequence[tuple[float, str]] = (),
    height: float = _HEIGHT,
) -> str:
    """Draw marks over lines, and a dashed guide with its name at each of some x.

    Marks that open something are links, so that Tab reaches them and Enter opens them, in the order given.

    Returns
    -------
    str
        An `<svg>` element, or an empty text if there is nothing to draw.
    """
    marks = [mark for mark in marks if math.isfinite(mark.x) and math.isfinite(mark.y)]
    if not marks and not any(trace.points for trace in traces):
        return ""
    along = [(mark.x, mark.y + side * (mark.whisker or 0.0)) for mark in marks for side in (-1, 1)]
    along += [point for trace in traces for point in trace.points]
    x = x_axis.scale([x for x, _ in along] + [at for at, _ in guides], _LEFT, WIDTH - RIGHT)
    y = y_axis_.scale([y for _, y in along], height - BOTTOM, TOP)
    parts = y_axis(y_axis_.ticks(y), y, y_axis_.name, height=height, left=_LEFT)
    for tick, number in x_axis.ticks(x):
        parts.append(text(x(tick), height - BOTTOM + 16, number, "axis middle"))
        parts.append(rule(x(tick), height - BOTTOM - 6, x(tick), height - BOTTOM, "tick"))
    parts.append(x_label(x_axis.name, height - 4))
    taken = [_around(x(mark.x), y(mark.y), mark.radius) for mark in marks]
    for at, name in guides:
        parts += [rule(x(at), TOP, x(at), height - BOTTOM, "guide"), text(x(at) + 4, TOP + 10, name, "axis")]
        taken.append((x(at) + 4, TOP, x(at) + 4 + _LETTER * len(name), TOP + _LINE))
    for trace in traces:
        points = " ".join(f"{x(at):.1f},{y(value):.1f}" for at, value in trace.points)
        parts.append(f'<polyline class="{escape(trace.css_class)}" points="{points}"/>')
    parts += [_mark(mark, x, y) for mark in marks]
    parts += _labels(marks, x, y, taken, height)
    return svg(parts, f"{y_axis_.name} over {x_axis.name}, {len(marks)} points", height=height, role="group")


Box = tuple[float, float, float, float]


def _around(x: float, y: float, radius: float) -> Box:
    return x - radius, y - radius, x + radius, y + radius


def _mark(mark: Mark, x: Scale, y: Scale) -> str:
    at, height = x(mark.x), y(mark.y)
    body = _shape(mark, at, height)
    if mark.whisker:
        body = rule(at, y(mark.y - mark.whisker), at, y(mark.y + mark.whisker), "whisker") + body
    told = f'class="mark {escape(mark.css_class)}" data-tip="{escape(mark.tip)}"'
    if mark.target:
        return f'<a href="#{escape(mark.target)}" {told} aria-label="{escape(mark.tip)}">{body}</a>'
    return f"<g {told}>{body}</g>"


def _shape(mark: Mark, x: float, y: float) -> str:
    size = mark.radius
    if mark.shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size:g}"/>'
    if mark.shape == "square":
        side = size * 0.9
        return f'<rect x="{x - side:.1f}" y="{y - side:.1f}" width="{2 * side:.1f}" height="{2 * side:.1f}"/>'
    if mark.shape == "diamond":
        corners = [(0.0, -1.25), (1.25, 0.0), (0.0, 1.25), (-1.25, 0.0)]
    else:
        radii = [1.7 if turn % 2 == 0 else 0.75 for turn in range(10)]
        corners = [
            (radius * math.sin(turn * math.pi / 5), -radius * math.cos(turn * math.pi / 5))
            for turn, radius in enumerate(radii)
        ]
    points = " ".join(f"{x + size * dx:.1f},{y + size * dy:.1f}" for dx, dy in corners)
    return f'<polygon points="{points}"/>'


def _labels(marks: Sequence[Mark], x: Scale, y: Scale, taken: list[Box], height: float) -> list[str]:
    """Put each label beside its mark, on the first side where it covers nothing; without such a side there is none."""
    parts = []
    for mark in marks:
        if not mark.label:
            continue
        wide, gap = _LETTER * len(mark.label), mark.radius + 4
        at, level = x(mark.x), y(mark.y)
        for left, baseline in (
            (at + gap, level + 4),
            (at - gap - wide, level + 4),
            (at + 2, level + gap + 10),
            (at - wide - 2, level - gap),
            (at + 2, level - gap),
            (at - wide - 2, level + gap + 10),
        ):
            box = (left, baseline - _LINE + 3, left + wide, baseline + 3)
            inside = box[0] >= _LEFT and box[2] <= WIDTH - RIGHT and box[1] >= TOP and box[3] <= height - BOTTOM
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                on_left = left < at
                parts.append(text(left + wide if on_left else left, baseline, mark.label, f"label {'end' * on_left}"))
                break
    return parts


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
