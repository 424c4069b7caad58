"""Allocate: choose the bits of the output channels of all layers from their measured errors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from pydantic import model_validator

from quant_spec.enums import AllocationMethod
from quant_spec.passes.allocate import AllocateChoice
from quant_spec.task import Source, TaskInputs, TaskKind, TaskParams

ALLOCATION = "allocation"


class Params(AllocateChoice, TaskParams):
    """How bits are chosen."""

    @model_validator(mode="after")
    def _leaves_a_choice(self) -> Self:
        if self.method is AllocationMethod.UNIFORM:
            raise ValueError("method: got uniform, which leaves nothing to choose, wanted another")
        return self


@dataclass(frozen=True, slots=True)
class Inputs(TaskInputs[Source]):
    """Errors of groups of units, in order."""

    errors: tuple[Source, ...]


KIND = TaskKind("allocate", 3, "workers.tasks.allocate:run", Params, Inputs, (ALLOCATION,))
