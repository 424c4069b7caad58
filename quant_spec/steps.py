"""Steps of a sampler's trajectory, in equal ranges."""

from __future__ import annotations


def range_of_step(step: int, steps: int, ranges: int) -> int:
    """Return which of so many equal ranges of the trajectory a step lies in."""
    return step * ranges // steps
