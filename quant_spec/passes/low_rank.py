"""Low rank: a branch of two thin 16-bit matrices beside each layer's codes (SVDQuant), before rounding."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from quant_spec.record import Count, Fraction, Record

Rank = Annotated[int, Field(ge=1, le=4096)]


class LowRank(Record):
    """Keep the largest singular values of each weight in 16 bits, and give codes to what is left (SVDQuant)."""

    rank: Rank | Literal["auto"] = Field(
        default="auto",
        description="Rank of each branch, at most half of what the layer has; auto takes the one that lowers the "
        "layer's measured error by most, a bit per weight counting as the 6.02 dB that it brings as a bit of codes.",
    )
    max_rank: Rank = Field(default=64, description="For auto: the greatest rank that is tried.")
    smoothing: Fraction | Literal["search"] | None = Field(
        default=None,
        description="Exponent by which channels' ranges move from inputs to weights first (SmoothQuant), or search, "
        "the best of ten for each layer; null where passes.scale does that, or nothing.",
    )
    convolutions: bool = Field(
        default=False, description="Whether convolutions get a branch too; else Linear layers alone do."
    )
    samples: Count = Field(default=32, description="Calibration seeds that errors are measured on, at most.")
    positions: Count = Field(
        default=16, description="Output positions per sample that errors are measured on, at most."
    )

    def idle_fields(self) -> set[str]:
        """Return the fields that cannot matter; a rank that is given has no greatest."""
        return super().idle_fields() | (set() if self.rank == "auto" else {"max_rank"})
