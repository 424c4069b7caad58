"""Scale: choose what the input channels of a group of units' layers are divided by, and their power-of-two steps."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import Field

from quant_spec.enums import RoundingMethod, Scaling
from quant_spec.passes.scale import Scale
from quant_spec.planned import Unit
from quant_spec.record import NotNegative
from quant_spec.task import Source, TaskInputs, TaskKind, UnitsParams

#: Name of the output with a unit's `channel_scale`s. It is part of the names of all tasks that read it, so it stays.
FACTORS = "factors"


class Params(Scale, UnitsParams):
    """The units, how their channels are scaled, and how their weights will be rounded."""

    units: tuple[Unit, ...]
    rounding: RoundingMethod = Field(default=RoundingMethod.CLOSED_FORM, description="Of the weights, later.")
    damping: NotNegative = Field(default=0.03, description="Share of the mean diagonal added to the Hessian.")

    def idle_fields(self) -> set[str]:
        """Return the fields that cannot matter; rounding does for scales that are learned against it."""
        idle = super().idle_fields()
        if self.method is not Scaling.LEARNED:
            return idle | {"rounding", "damping"}
        return idle if self.rounding is RoundingMethod.CLOSED_FORM else idle | {"damping"}


@dataclass(frozen=True, slots=True)
class Inputs(TaskInputs[Source]):
    """The model's tree, shards of its calibration; bits of each step where activation bits are open."""

    model: Source
    calibration: tuple[Source, ...]
    step_bits: Source | None = None


KIND = TaskKind("scale", 3, "workers.tasks.scale:run", Params, Inputs, (f"{FACTORS}:*",), gpu=True)
