"""Pack: put the states of all units into one folder that diffusers loads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pydantic import Field

from quant_spec.enums import UnknownTimestep
from quant_spec.sampler import Sampler
from quant_spec.task import Source, TaskInputs, TaskKind, TaskParams

PACKED = "packed"


class Params(TaskParams):
    """The sampler that goes with the model, and what the model does off its trajectory."""

    _omitted: ClassVar[frozenset[str]] = frozenset({"unknown_timestep"})

    sampler: Sampler
    unknown_timestep: UnknownTimestep = Field(
        default=UnknownTimestep.ERROR, description="At a timestep that was not calibrated for."
    )


@dataclass(frozen=True, slots=True)
class Inputs(TaskInputs[Source]):
    """The model's tree, and the state of each unit, in the order in which they run."""

    model: Source
    states: tuple[Source, ...]


KIND = TaskKind("pack", 3, "workers.tasks.pack:run", Params, Inputs, (PACKED,), trees=(PACKED,))
