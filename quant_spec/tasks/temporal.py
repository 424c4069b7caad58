"""Temporal: quantize the temporal information block, over the sampler's finite set of timesteps."""

from __future__ import annotations

from dataclasses import dataclass

from quant_spec.passes.temporal import TemporalFit
from quant_spec.planned import Attention, Layer, PlannedUnit
from quant_spec.task import Source, TaskInputs, TaskKind, TaskParams

STATE = "state"


class Params(TemporalFit, TaskParams):
    """The block's layers, and how they are quantized."""

    unit: str
    layers: dict[str, Layer]
    attentions: dict[str, Attention]

    @property
    def planned(self) -> PlannedUnit:
        """The block as a unit."""
        return PlannedUnit(self.unit, self.layers, self.attentions)


@dataclass(frozen=True, slots=True)
class Inputs(TaskInputs[Source]):
    """The model's tree, and shards of its calibration."""

    model: Source
    calibration: tuple[Source, ...]


KIND = TaskKind("temporal", 1, "workers.tasks.temporal:run", Params, Inputs, (STATE,), gpu=True)
