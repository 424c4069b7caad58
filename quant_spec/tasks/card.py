"""Card: a release with what `bench` measured of it in its model card and in bench.json; all else is the same bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import Field

from quant_spec.task import Source, TaskInputs, TaskKind, TaskParams

ARTIFACT = "artifact"


class Params(TaskParams):
    """The figures."""

    bench: dict[str, Any] = Field(description="As `quantmill bench --json` prints them.")


@dataclass(frozen=True, slots=True)
class Inputs(TaskInputs[Source]):
    """The release's tree."""

    artifact: Source


KIND = TaskKind("card", 1, "workers.tasks.card:run", Params, Inputs, (ARTIFACT,), trees=(ARTIFACT,))
