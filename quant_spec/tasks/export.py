"""Export: a release as other tools load it, float16 or in the blocks or numbers of another format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pydantic import Field

from quant_spec.enums import ExportFormat
from quant_spec.task import Source, TaskInputs, TaskKind, TaskParams

MODEL = "model"


class Params(TaskParams):
    """What it is written as."""

    _omitted: ClassVar[frozenset[str]] = frozenset({"format"})

    format: ExportFormat = Field(default=ExportFormat.DEQUANTIZED, description="What the release is written as.")


@dataclass(frozen=True, slots=True)
class Inputs(TaskInputs[Source]):
    """The release's tree."""

    artifact: Source


KIND = TaskKind("export", 1, "workers.tasks.export:run", Params, Inputs, (MODEL,), trees=(MODEL,))
