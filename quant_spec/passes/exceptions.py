"""Exceptions: what stays in full precision, found by trying each part of the model alone."""

from __future__ import annotations

from pydantic import Field

from quant_spec.record import Count, Fraction, Record, Seed


class ExceptionsChoice(Record):
    """How much may stay in full precision."""

    multiplications: Fraction = Field(
        default=0.1,
        description="Share of the model's multiplications whose operands may stay in full precision: of layers by "
        "their inputs, of attention by its products.",
    )
    bytes: Fraction = Field(
        default=0.0,
        description="Bytes that layers may add whose weights stay in full precision, as a share of those of all "
        "quantized ones; 0 tries no weights.",
    )


class Exceptions(ExceptionsChoice):
    """Leave in full precision what costs the final samples most when it is quantized alone, within a budget."""

    seeds: Count = Field(default=2, description="Seeds that each part is tried on, at all steps.")
    first_seed: Seed = Field(default=6_000_000, description="First of their seeds.")
