"""Allocate: give each output channel its own weight bits around `weights.bits` (MPQ-DM)."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from quant_spec.enums import AllocationMethod
from quant_spec.record import Count, Record

#: Bits around which channels can have one more or one less.
ALLOCATED_BITS = (2, 3, 4, 5)


class AllocateMeasure(Record):
    """How much errors are measured on."""

    samples: Count = Field(default=8, description="Calibration seeds that errors are measured on, at most.")
    positions: Count = Field(
        default=16, description="Output positions per sample that errors are measured on, at most."
    )


class AllocateChoice(Record):
    """How bits are chosen, given the errors."""

    method: AllocationMethod = Field(
        default=AllocationMethod.KURTOSIS,
        description="In each layer the channels of heaviest tails get a bit more, as many of lightest tails one less "
        "(kurtosis); the same over all layers at once, by an exact knapsack over the error that each makes at the "
        "prediction (global); or none (uniform).",
    )
    extra: Annotated[float, Field(ge=0, le=0.5)] = Field(
        default=0.0,
        description="Bits per weight above weights.bits, at most, as channels that get one more bit without another "
        "losing one.",
    )


class Allocate(AllocateChoice, AllocateMeasure):
    """Give each output channel its own weight bits around `weights.bits` (MPQ-DM), where no exception says others."""

    @property
    def is_uniform(self) -> bool:
        """Whether all channels have the same bits."""
        return self.method is AllocationMethod.UNIFORM

    @model_validator(mode="after")
    def _has_use(self) -> Self:
        if self.is_uniform and self.extra:
            raise ValueError(f"extra: got {self.extra:g} with method uniform, wanted 0")
        return self
