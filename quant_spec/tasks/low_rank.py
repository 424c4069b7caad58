"""Low rank: choose the 16-bit branches of a group of units' layers, and what their input channels are divided by."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import Field

from quant_spec.enums import RoundingMethod
from quant_spec.passes.low_rank import LowRank
from quant_spec.planned import Unit
from quant_spec.record import NotNegative
from quant_spec.task import Source, TaskInputs, TaskKind, UnitsParams

BRANCHES, FACTORS = "branches", "factors"


class Params(LowRank, UnitsParams):
    """The units, how branches are chosen, and how what is left of the weights will be rounded."""

    units: tuple[Unit, ...]
    rounding: RoundingMethod = Field(default=RoundingMethod.CLOSED_FORM, description="Of what is left, later.")
    damping: NotNegative = Field(default=0.03, description="Share of the mean diagonal added to the Hessian.")


@dataclass(frozen=True, slots=True)
class Inputs(TaskInputs[Source]):
    """The model's tree, shards of its calibration; bits of each step where activation bits are open.

    `factors` of each unit, if channels are scaled; then the task gives no others.
    """

    model: Source
    calibration: tuple[Source, ...]
    step_bits: Source | None = None
    factors: tuple[Source, ...] = ()


KIND = TaskKind(
    "low_rank", 1, "workers.tasks.low_rank:run", Params, Inputs, (f"{BRANCHES}:*", f"{FACTORS}:*"), gpu=True
)
