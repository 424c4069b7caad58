"""Release: the packed model, what was measured of it and where it came from, composed to what is published."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import Field

from quant_spec.record import Record
from quant_spec.task import Source, TaskInputs, TaskKind, TaskParams

ARTIFACT = "artifact"


class Origin(Record):
    """The base model."""

    name: str
    class_name: str
    source: str | None = Field(description='"hf:owner/name@revision", or null: a path means nothing elsewhere.')


class ResolvedRecipe(Record):
    """The recipe, with every field, and its digest."""

    name: str
    digest: str
    config: dict[str, Any]


class Params(TaskParams):
    """What the release says of its origin."""

    model: Origin
    recipe: ResolvedRecipe


@dataclass(frozen=True, slots=True)
class Inputs(TaskInputs[Source]):
    """The packed tree, its score, and what is recorded as provenance."""

    packed: Source
    score: Source
    calibration: tuple[Source, ...]
    model: Source


KIND = TaskKind("release", 1, "workers.tasks.release:run", Params, Inputs, (ARTIFACT,), trees=(ARTIFACT,))
