"""Exceptions: what stays in full precision, or has other bits, found by trying each part of the model alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, model_validator

from quant_spec.record import Bits, Count, Fraction, Record, Seed


class ExceptionsChoice(Record):
    """How much may stay in full precision, or which bits inputs may have instead."""

    _omitted: ClassVar[frozenset[str]] = frozenset({"choices"})
    _only_if: ClassVar[Mapping[tuple[str, Any], frozenset[str]]] = {
        ("choices", ()): frozenset({"multiplications", "bytes"})
    }

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
    choices: Annotated[tuple[Bits, ...], Field(max_length=6)] = Field(
        default=(),
        description="Bits that layers' inputs choose from at each trajectory step, in place of full precision; their "
        "mean over multiplications and steps stays the recipe's. [] chooses none.",
    )

    @model_validator(mode="after")
    def _rises(self) -> Self:
        if list(self.choices) != sorted(set(self.choices)) or len(self.choices) == 1:
            raise ValueError(f"choices: got {list(self.choices)}, wanted different bits in rising order, or none")
        return self


class Exceptions(ExceptionsChoice):
    """Leave in full precision what costs the final samples most when it is quantized alone, within a budget."""

    seeds: Count = Field(default=2, description="Seeds that each part is tried on, at all steps.")
    first_seed: Seed = Field(default=6_000_000, description="First of their seeds.")
