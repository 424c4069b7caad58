"""Differences: what layers read is quantized as its difference to the step before, in closed loop (MoDiff)."""

from __future__ import annotations

import builtins
from typing import Annotated, Any, ClassVar

from pydantic import Field, field_validator

from quant_spec.enums import RangeMethod
from quant_spec.record import Bits, Count, NotNegative, Record
from quant_spec.steps import range_of_step


class DifferencesFit(Record):
    """How differences are quantized, and where."""

    _omitted: ClassVar[frozenset[str]] = frozenset({"range_bits", "by_effect"})

    bits: Bits = Field(default=4, description="Bits of a difference; other steps keep those of activations.")
    range_bits: Annotated[tuple[Bits, ...], Field(min_length=1, max_length=64)] | None = Field(
        default=None,
        description="Bits of a difference for each of so many equal ranges of trajectory steps, noisiest first, in "
        "place of bits.",
    )
    by_effect: bool = Field(
        default=False,
        description="Whether steps of layers get more or fewer bits by what rounding there does to the final samples; "
        "the mean, weighted by multiplications, stays what bits say.",
    )
    range: RangeMethod = Field(
        default=RangeMethod.MINMAX,
        description="How the range of a difference is found: minmax, or mse, which clips, so that the rest is in the "
        "next difference.",
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

    def widths(self, steps: int) -> tuple[int, ...]:
        """Return the bits of a difference at each of so many trajectory steps."""
        chosen = (self.bits,) if self.range_bits is None else self.range_bits
        return tuple(chosen[range_of_step(step, steps, len(chosen))] for step in builtins.range(steps))

    def idle_fields(self) -> set[str]:
        """Return the fields that cannot matter: bits of ranges stand in place of bits."""
        return super().idle_fields() | (set() if self.range_bits is None else {"bits"})

    @field_validator("range")
    @classmethod
    def _needs_no_share(cls, value: Any) -> Any:
        if value is RangeMethod.PERCENTILE:
            raise ValueError("got percentile, wanted minmax or mse")
        return value


class Differences(DifferencesFit):
    """Quantize what layers read as its difference to the step before, in closed loop, in layers whose bits no exception
    states (MoDiff)."""
