"""Seeds in runs that one task samples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from quant_spec.task import Seeds


@dataclass(frozen=True, slots=True)
class Shard:
    """Consecutive seeds of one task, of which the trajectories of the first `recorded` are recorded."""

    first: int
    count: int
    recorded: int = 0

    @property
    def seeds(self) -> Seeds:
        """The seeds as a task's parameter."""
        return Seeds(first=self.first, count=self.count)

    @property
    def label(self) -> str:
        """The seeds for people."""
        return f"seeds {self.first}-{self.first + self.count - 1}"


def shards(first: int, seeds: int, size: int, recorded: int = 0) -> Iterator[Shard]:
    """Split seeds into shards of at most `size`; the first `recorded` seeds in all have their trajectories recorded."""
    for start in range(0, seeds, size):
        count = min(size, seeds - start)
        yield Shard(first + start, count, max(0, min(count, recorded - start)))
