"""Noop: waits, and stores a blob that follows from its parameters and inputs; for benchmarks and recovery drills."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field

from quant_spec.task import Source, TaskInputs, TaskKind, TaskParams

BLOB = "blob"


class Params(TaskParams):
    """How long to wait, and anything that makes a task another one."""

    _omitted: ClassVar[frozenset[str]] = frozenset({"seconds", "payload"})

    seconds: Annotated[float, Field(ge=0)] = Field(default=0.0, description="How long the task waits.")
    payload: Any = None


@dataclass(frozen=True, slots=True)
class Inputs(TaskInputs[Source]):
    """Whatever is given, by any name."""

    sources: Mapping[str, tuple[Source, ...]] = field(default_factory=dict)

    @classmethod
    def from_json(cls, data: Mapping[str, Sequence[Source]]) -> Self:
        """Read names and digests; all names will do."""
        return cls({name: tuple(found) for name, found in data.items()})

    def to_json(self) -> dict[str, tuple[Source, ...]]:
        """Return names and sources."""
        return dict(self.sources)


KIND = TaskKind("noop", 1, "workers.tasks.noop:run", Params, Inputs, (BLOB,))
