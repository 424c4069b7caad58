"""Round: fix weight grids, round the weights, measure activation ranges."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field, model_validator

from quant_spec.enums import RoundingMethod
from quant_spec.record import Count, NotNegative, Record


class RoundFit(Record):
    """How weights are rounded."""

    _only_if: ClassVar[Mapping[tuple[str, Any], frozenset[str]]] = {
        ("method", RoundingMethod.CLOSED_FORM): frozenset({"samples", "positions", "damping", "correct_bias"}),
    }

    _omitted: ClassVar[frozenset[str]] = frozenset({"correct_bias"})

    method: RoundingMethod = Field(
        default=RoundingMethod.NEAREST, description="To the nearest code, or by second-order rounding (GPTQ)."
    )
    samples: Count = Field(default=32, description="Calibration seeds that the Hessian is taken over, at most.")
    positions: Count = Field(
        default=16, description="Output positions per sample that the Hessian is taken over, at most."
    )
    damping: NotNegative = Field(default=0.03, description="Share of the mean diagonal added to the Hessian.")
    correct_bias: bool = Field(
        default=False,
        description="Layers' biases take the mean error that rounding leaves, and the codes are those of the rest.",
    )


class Round(RoundFit):
    """Fix weight grids, round the weights, measure activation ranges."""

    @model_validator(mode="before")
    @classmethod
    def _from_older_recipes(cls, values: Any) -> Any:
        """Drop `inputs: fp`, which older recipes hold: it was the only value there was."""
        if isinstance(values, Mapping) and values.get("inputs") == "fp":
            return {name: value for name, value in values.items() if name != "inputs"}
        return values
