"""Reconstruct: learn the rounding of one unit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from quant_spec.passes.reconstruct import Reconstruct
from quant_spec.task import Source, TaskInputs, TaskKind, UnitsParams

STATE = "state"


class Params(Reconstruct, UnitsParams):
    """How a unit is reconstructed; which one, its state says."""

    cache_bytes: Annotated[int, Field(ge=1)] = Field(
        description="Bytes of recorded activations that stay in memory; more goes to disk."
    )


@dataclass(frozen=True, slots=True)
class Inputs(TaskInputs[Source]):
    """The model's tree, shards of its calibration, and states.

    `state`: what `round` gave for the unit; `earlier`: of the units before it, if inputs are quantized; `temporal`:
    what `temporal` gave, if the unit has layers of that block inside or its inputs are quantized.
    """

    model: Source
    calibration: tuple[Source, ...]
    state: Source
    earlier: tuple[Source, ...] = ()
    temporal: Source | None = None


KIND = TaskKind(
    "reconstruct",
    2,
    "workers.tasks.reconstruct:run",
    Params,
    Inputs,
    (STATE,),
    gpu=True,
    batch_free="forward_batch_size",
)
