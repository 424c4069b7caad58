"""Channel errors: what the bits of output channels do, for the layers of a group of units."""

from __future__ import annotations

from dataclasses import dataclass

from quant_spec.passes.allocate import AllocateMeasure
from quant_spec.planned import Unit
from quant_spec.task import Source, TaskInputs, TaskKind, UnitsParams

ERRORS = "errors"


class Params(AllocateMeasure, UnitsParams):
    """The units, which of their layers to measure, and on how much."""

    units: tuple[Unit, ...]
    layers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Inputs(TaskInputs[Source]):
    """The model's tree, shards of its calibration; what `scale` chose for each unit, if channels are scaled."""

    model: Source
    calibration: tuple[Source, ...]
    factors: tuple[Source, ...] = ()


KIND = TaskKind("channel_errors", 4, "workers.tasks.channel_errors:run", Params, Inputs, (ERRORS,), gpu=True)
