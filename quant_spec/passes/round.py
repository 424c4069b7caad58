"""Round: fix weight grids, round the weights, measure activation ranges."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from quant_spec.enums import RoundingMethod, UnitInputs
from quant_spec.record import Count, NotNegative, Record


class AnswerFit(Record):
    """What of a layer's input its codes are chosen from in closed form."""

    _omitted: ClassVar[frozenset[str]] = frozenset({"correct_bias"})

    samples: Count = Field(default=32, description="Calibration seeds that the Hessian is taken over, at most.")
    positions: Count = Field(
        default=16, description="Output positions per sample that the Hessian is taken over, at most."
    )
    damping: NotNegative = Field(default=0.03, description="Share of the mean diagonal added to the Hessian.")
    correct_bias: bool = Field(
        default=False,
        description="Layers' biases take the mean error that rounding leaves, and the codes are those of the rest.",
    )


class _Method(Record):
    """In which way; a base of its own, as it is the first to be listed."""

    method: RoundingMethod = Field(
        default=RoundingMethod.NEAREST, description="To the nearest code, or by second-order rounding (GPTQ)."
    )


class RoundFit(AnswerFit, _Method):
    """How weights are rounded."""

    _only_if: ClassVar[Mapping[tuple[str, Any], frozenset[str]]] = {
        ("method", RoundingMethod.CLOSED_FORM): frozenset({"samples", "positions", "damping", "correct_bias"}),
    }


class Round(RoundFit):
    """Fix weight grids, round the weights, measure activation ranges."""

    _only_if: ClassVar[Mapping[tuple[str, Any], frozenset[str]]] = {
        ("method", RoundingMethod.CLOSED_FORM): frozenset(
            {"samples", "positions", "damping", "correct_bias", "inputs"}
        ),
    }

    _omitted: ClassVar[frozenset[str]] = frozenset({"correct_bias", "inputs"})

    inputs: UnitInputs = Field(
        default=UnitInputs.FP,
        description="Layers' inputs: from the full-precision model, or what the quantized layers before give, all "
        "layers one after another in a task of its own; codes then answer for the error of these inputs, too (GPTAQ).",
    )

    @property
    def answers(self) -> bool:
        """Whether codes answer for what the layers before leave."""
        return self.method is RoundingMethod.CLOSED_FORM and self.inputs is UnitInputs.QUANTIZED
