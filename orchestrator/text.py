"""Times and tables for people: durations, dates, columns."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime


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
