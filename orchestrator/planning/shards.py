"""Seeds in runs that one task samples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Shard:
    """Consecutive seeds of one task, as JSON parameters; `sqnr` of its first seeds are compared step by step."""

    first: int
    count: int
    sqnr: int = 0

    @property
    def seeds(self) -> dict[str, int]:
        """The seeds as a task's parameter."""
        return {"first": self.first, "count": self.count}

    @property
    def label(self) -> str:
        """The seeds for people."""
        return f"seeds {self.first}-{self.first + self.count - 1}"


def shards(first: int, seeds: int, size: int, sqnr: int = 0) -> Iterator[Shard]:
    """Split seeds into shards of at most `size`; the first `sqnr` seeds in all are compared step by step."""
    for start in range(0, seeds, size):
        count = min(size, seeds - start)
        yield Shard(first + start, count, max(0, min(count, sqnr - start)))
