"""Export: the weights that a release's codes stand for, as a plain float16 model that any diffusers loads."""

from __future__ import annotations

from dataclasses import dataclass

from quant_spec.task import Source, TaskInputs, TaskKind, TaskParams

MODEL = "model"


class Params(TaskParams):
    """Nothing: the codes are all."""


@dataclass(frozen=True, slots=True)
class Inputs(TaskInputs[Source]):
    """The release's tree."""

    artifact: Source


KIND = TaskKind("export", 1, "workers.tasks.export:run", Params, Inputs, (MODEL,), trees=(MODEL,))
