"""Release: the packed model, what was measured of it and where it came from, composed to what is published."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import Field

from quant_spec.record import Record
from quant_spec.task import Source, TaskInputs, TaskKind, TaskParams

ARTIFACT = "artifact"


class FusedLora(Record):
    """A LoRA file, and how much of it was added."""

    file: str
    sha256: str
    scale: float


class Origin(Record):
    """The base model."""

    name: str
    class_name: str
    source: str | None = Field(description='"hf:owner/name@revision", or null: a path means nothing elsewhere.')
    loras: tuple[FusedLora, ...] = Field(default=(), description="LoRA files that were fused into it, in order.")

    _omitted: ClassVar[frozenset[str]] = frozenset({"loras"})


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
    """The packed tree, its score, and what is recorded as provenance; a pipeline's tree with packed text encoders."""

    packed: Source
    score: Source
    calibration: tuple[Source, ...]
    model: Source
    whole: Source | None = None


KIND = TaskKind("release", 1, "workers.tasks.release:run", Params, Inputs, (ARTIFACT,), trees=(ARTIFACT,))
