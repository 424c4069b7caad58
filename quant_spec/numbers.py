"""Numbers for people, and rounded to what of them means anything."""

from __future__ import annotations


def significant(value: float) -> float:
    """Return a number rounded to six significant digits, so that it is written in as many."""
    return float(f"{value:.6g}")


def human_bytes(count: float, decimals: int = 1) -> str:
    """Return a size in bytes, kB, MB, … of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.{decimals}f} {unit}"
        count /= 1000
    return f"{count:.{decimals}f} TB"


def human_count(count: float) -> str:
    """Return a large number with k, M, G, T or P of 1000, three digits."""
    for unit in ("", "k", "M", "G", "T"):
        if abs(count) < 1000:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g}P"
