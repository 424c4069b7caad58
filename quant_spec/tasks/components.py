"""Components: a pipeline's tree with some components in packed form, for who samples with the quantized model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from quant_spec.task import Source, TaskInputs, TaskKind, TaskParams

PIPELINE = "pipeline"


class Params(TaskParams):
    """Names of the components, in the order of the inputs."""

    components: Annotated[tuple[str, ...], Field(min_length=1, max_length=100)]


@dataclass(frozen=True, slots=True)
class Inputs(TaskInputs[Source]):
    """The pipeline's tree, and one of each packed component."""

    model: Source
    packed: tuple[Source, ...]


KIND = TaskKind("components", 1, "workers.tasks.components:run", Params, Inputs, (PIPELINE,), trees=(PIPELINE,))
