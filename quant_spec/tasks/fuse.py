"""Fuse: a whole pipeline with LoRA files added to its weights, as a model of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from quant_spec.task import Source, TaskInputs, TaskKind, TaskParams

FUSED = "model"
#: File of a fused model's tree that says what was fused, in order: a list of `sha256` and `scale`.
LORAS_FILE = "loras.json"
#: How much of a LoRA is added.
Scale = Annotated[float, Field(ge=-100, le=100)]


class Params(TaskParams):
    """How much of each file is added, in the order of the inputs."""

    scales: Annotated[tuple[Scale, ...], Field(min_length=1, max_length=100)]


@dataclass(frozen=True, slots=True)
class Inputs(TaskInputs[Source]):
    """The pipeline's tree, and LoRA files."""

    model: Source
    loras: tuple[Source, ...]


KIND = TaskKind("fuse", 1, "workers.tasks.fuse:run", Params, Inputs, (FUSED,), trees=(FUSED,))
