"""Exceptions: leave in full precision what trials say costs most, within a budget."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import Field

from quant_spec.passes.exceptions import ExceptionsChoice
from quant_spec.task import Source, TaskInputs, TaskKind, TaskParams

STATE = "state"


class Params(ExceptionsChoice, TaskParams):
    """The budget, and the multiplications that it is a share of."""

    macs: dict[str, int] = Field(
        description="Layers, and attentions, that may be exceptions, with their multiplications at batch 1."
    )
    all_macs: int = Field(description="Multiplications of the whole model at batch 1.")


@dataclass(frozen=True, slots=True)
class Inputs(TaskInputs[Source]):
    """The model's tree, the state of each unit that was tried, in running order, and the damages of all groups."""

    model: Source
    states: tuple[Source, ...]
    damages: tuple[Source, ...]


KIND = TaskKind("exceptions", 1, "workers.tasks.exceptions:run", Params, Inputs, (f"{STATE}:*",))
