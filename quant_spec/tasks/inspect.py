"""Inspect: what the planner must know of a model."""

from __future__ import annotations

from dataclasses import dataclass

from quant_spec.task import Source, TaskInputs, TaskKind, TaskParams

INSPECTION = "inspection"


class Params(TaskParams):
    """Nothing: what a model is depends on the model alone."""


@dataclass(frozen=True, slots=True)
class Inputs(TaskInputs[Source]):
    """The model's tree."""

    model: Source


KIND = TaskKind("inspect", 3, "workers.tasks.inspect:run", Params, Inputs, (INSPECTION,))
