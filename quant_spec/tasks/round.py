"""Round: quantize a group of units without gradients."""

from __future__ import annotations

from dataclasses import dataclass

from quant_spec.passes.round import RoundFit
from quant_spec.planned import Unit
from quant_spec.task import Source, TaskInputs, TaskKind, UnitsParams

STATE = "state"


class Params(RoundFit, UnitsParams):
    """The units, and how their weights are rounded."""

    units: tuple[Unit, ...]


@dataclass(frozen=True, slots=True)
class Inputs(TaskInputs[Source]):
    """The model's tree, shards of its calibration, and what was chosen before.

    `step_bits` where activation bits are open; `factors` of each unit, if channels are scaled; `branches` of each unit,
    if layers have low-rank branches; `allocation`, if layers are marked as allocated.
    """

    model: Source
    calibration: tuple[Source, ...]
    step_bits: Source | None = None
    factors: tuple[Source, ...] = ()
    branches: tuple[Source, ...] = ()
    allocation: Source | None = None


KIND = TaskKind("round", 2, "workers.tasks.round:run", Params, Inputs, (f"{STATE}:*",), gpu=True)
