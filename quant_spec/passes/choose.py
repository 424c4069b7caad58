"""Choose: the weight bits of each layer, from the menu, by what they do to the final samples."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from quant_spec.record import Count, Record
from quant_spec.search import Bytes, SearchBudget
from quant_spec.task import Seeds

#: Seeds that step gains are measured on; no calibration, evaluation or screening has them.
GAIN_SEEDS = Seeds(first=5_000_000, count=4)


class ChooseMeasure(Record):
    """On how much choices are measured."""

    rows: Count = Field(
        default=6,
        description="Calibration rows that each choice is measured on, most of them of the steps where most of the "
        "damage is made.",
    )
    path: Literal[0, 1, 2] = Field(
        default=0,
        description="Points on the way from full precision to the middle width that all other layers are at "
        "meanwhile; 0 measures each layer alone.",
    )


class ChooseBudget(Record):
    """What the chosen bits may cost; of two limits both hold."""

    _omitted: ClassVar[frozenset[str]] = frozenset({"weight_bits_mean", "bytes"})

    weight_bits_mean: Annotated[float, Field(gt=0, le=32)] | None = Field(
        default=None, description="Mean bits of a weight, at most, over all layers on the menu."
    )
    bytes: Bytes | None = Field(
        default=None,
        description="Bytes of the packed weights file, at most, with everything in it: a number, or text such as "
        "2.8MB. Without any limit, as many as the recipe's own bits take.",
    )

    def limits(self) -> SearchBudget | None:
        """Return the limits as a search has them; None if there is none."""
        if self.weight_bits_mean is None and self.bytes is None:
            return None
        return SearchBudget(weight_bits_mean=self.weight_bits_mean, bytes=self.bytes)


class Choose(ChooseMeasure, ChooseBudget):
    """Choose each layer's weight bits from the menu, by their measured damage to the samples, within a budget."""
