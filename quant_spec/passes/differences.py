"""Differences: what layers read is quantized as its difference to the step before, in closed loop (MoDiff)."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator

from quant_spec.enums import RangeMethod
from quant_spec.record import Bits, Count, NotNegative, Record


class DifferencesFit(Record):
    """How differences are quantized, and where."""

    bits: Bits = Field(default=4, description="Bits of a difference; other steps keep those of activations.")
    range: RangeMethod = Field(
        default=RangeMethod.MSE,
        description="How the range of a difference is found: minmax or mse. What is clipped is in the next difference.",
    )
    least_gain_db: NotNegative = Field(
        default=6.0,
        description="A step of a layer stays plain where a difference, of so many bits, has not so much less error "
        "than its input at as many bits.",
    )
    state_mib: Annotated[float, Field(gt=0, le=1e6)] = Field(
        default=256.0,
        description="MiB that layers may remember of a sample between steps (4 bytes for each element that they read "
        "or write); those beyond it, with the fewest multiplications per byte, stay plain.",
    )
    samples: Count = Field(
        default=32, description="Calibration samples that run at once, in closed loop, to find the ranges; at most."
    )

    @field_validator("range")
    @classmethod
    def _needs_no_share(cls, value: Any) -> Any:
        if value is RangeMethod.PERCENTILE:
            raise ValueError("got percentile, wanted minmax or mse")
        return value


class Differences(DifferencesFit):
    """Quantize what layers read as its difference to the step before, in closed loop, in layers whose bits no exception
    states (MoDiff)."""
