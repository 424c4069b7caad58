"""What all charts are made of: scales, round ticks, and pieces of SVG as text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

#: Pixels of a chart, and of its margins, in which ticks and labels stand.
WIDTH, HEIGHT = 1040, 260
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 40
_TICKS = 5


@dataclass(frozen=True, slots=True)
class Scale:
    """A map from [low, high] to pixels, linear or in the logarithm, where less than `low` stands at it."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(max(value, low))
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def nice_ticks(low: float, high: float, count: int = _TICKS) -> list[float]:
    """Return about so many round numbers that enclose [low, high].

    Parameters
    ----------
    low, high
        Finite; if they are equal, a unit range around them is taken.
    """
    if not low < high:
        low, high = low - 0.5, high + 0.5
    raw = (high - low) / (count - 1)
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * index, 10) for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return powers of ten within [low, high], both above 0; if they are few, 2 and 5 times such too."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1,) if last - first > 3 else (1, 2, 5)
    stride = math.ceil((last - first) / (_TICKS + 1)) if len(factors) == 1 else 1
    ticks = [factor * 10.0**power for power in range(first, last + 1, stride) for factor in factors]
    return [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]


def text(x: float, y: float, words: str, css_class: str) -> str:
    """Return words at a place; the class says which end stands there."""
    return f'<text class="{css_class}" x="{x:.1f}" y="{y:.1f}">{escape(words)}</text>'


def title(words: str) -> str:
    """Return what hovering shows."""
    return f"<title>{escape(words)}</title>"


def rule(x1: float, y1: float, x2: float, y2: float, css_class: str = "rule") -> str:
    """Return a straight line."""
    return f'<line class="{css_class}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def y_axis(
    ticks: Sequence[tuple[float, str]], y: Scale, label: str, *, height: float = HEIGHT, left: float = LEFT
) -> list[str]:
    """Return a line and a number for each tick, and the axis' name along it."""
    parts = []
    for tick, words in ticks:
        at = y(tick)
        parts += [rule(left, at, WIDTH - RIGHT, at), text(left - 6, at + 4, words, "axis end")]
    middle = (TOP + height - BOTTOM) / 2
    turn = f"rotate(-90 12 {middle:.1f})"
    parts.append(f'<text class="axis middle" x="12" y="{middle:.1f}" transform="{turn}">{escape(label)}</text>')
    return parts


def x_label(label: str, y: float) -> str:
    """Return the name of the axis below a chart."""
    return text((LEFT + WIDTH) / 2, y, label, "axis middle")


def svg(parts: Sequence[str], description: str, *, height: float = HEIGHT, role: str = "img") -> str:
    """Return a chart; its role is `group` where its marks can be reached by keyboard."""
    body = "".join(parts)
    return f'<svg viewBox="0 0 {WIDTH} {height:g}" role="{role}" aria-label="{escape(description)}">{body}</svg>'
