"""Texts for people: durations, dates, columns, and nothing in them that steers a terminal."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime

# Control characters but newline and tab, what separates lines elsewhere, what turns the direction of writing, halves of
# characters that cannot be written.
_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Return a text without what a terminal takes for an order; it stands there in Python's way: `\\x1b`.

    Names and messages may come from a file, a database or a store that somebody else wrote to.
    """
    return _STEERING.sub(lambda match: match[0].encode("unicode_escape", "surrogatepass").decode(), text)


def human_seconds(seconds: float) -> str:
    """Return a duration: "0.4 s", "12 s", "3 min 20 s", "2 h 05 min"."""
    if seconds < 9.95:
        return f"{max(seconds, 0.0):.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def utc_text(epoch: float | None) -> str | None:
    """Return a time as ISO 8601 UTC to the second, None as None."""
    if epoch is None:
        return None
    return datetime.fromtimestamp(epoch, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return rows in aligned columns under a header; numbers to the right, None as "-"."""
    cells = [["-" if value is None else str(value) for value in row] for row in rows]
    widths = [max(len(line[index]) for line in [list(header), *cells]) for index in range(len(header))]
    numeric = [
        bool(rows) and all(row[index] is None or isinstance(row[index], int | float) for row in rows)
        for index in range(len(header))
    ]

    def line(values: Sequence[str]) -> str:
        parts = [
            value.rjust(width) if right else value.ljust(width)
            for value, width, right in zip(values, widths, numeric, strict=True)
        ]
        return "  ".join(parts).rstrip()

    return "\n".join(line(values) for values in [list(header), *cells])
