"""Consecutive seeds, split between tasks."""

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
        """As task parameters."""
        return {"first": self.first, "count": self.count}

    @property
    def label(self) -> str:
        """For people."""
        return f"seeds {self.first}-{self.first + self.count - 1}"


def shards_of(first: int, seeds: int, size: int, sqnr: int = 0) -> Iterator[Shard]:
    """Split `seeds` consecutive seeds, from `first` on, into runs of at most `size`."""
    for start in range(0, seeds, size):
        count = min(size, seeds - start)
        yield Shard(first + start, count, max(0, min(count, sqnr - start)))
