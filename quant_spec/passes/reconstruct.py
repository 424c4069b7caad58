"""Reconstruct: learn the rounding of each unit so that its output stays what it was (AdaRound)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from pydantic import Field, model_validator

from quant_spec.enums import StartCodes, UnitInputs
from quant_spec.record import Count, NotNegative, Positive, Record, Share


class Reconstruct(Record):
    """Learn the rounding of each unit so that its output stays what it was (AdaRound)."""

    _only_if: ClassVar[Mapping[tuple[str, Any], frozenset[str]]] = {
        ("learn_activation_scales", True): frozenset({"activation_lr"})
    }

    inputs: UnitInputs = Field(
        default=UnitInputs.FP,
        description="Unit inputs: from the full-precision model (all units at once) or the quantized one (in order).",
    )
    start: StartCodes = Field(
        default=StartCodes.NEAREST, description="Codes that the learning starts from: nearest, or those of round."
    )
    iterations: Count = Field(default=200, description="Iterations of Adam.")
    batch_size: Count = Field(default=32, description="Samples per iteration.")
    lr: Positive = Field(default=1e-2, description="Rate of Adam at the start.")
    trust: Share = Field(
        default=0.5, description="How far the start leans to the given code: 0, AdaRound's own start, to 1."
    )
    learn_activation_scales: bool = Field(
        default=False, description="Learn static or per-step activation scales with the rounding."
    )
    activation_lr: Positive = Field(default=4e-4, description="Rate of the activation scales.")
    rounding_weight: NotNegative = Field(
        default=100.0, description="Weight of the rounding regulariser, against a loss of 1 at the start."
    )
    warmup: Share = Field(default=0.0, description="Share of the iterations without the rounding regulariser.")
    beta: tuple[Positive, Positive] = Field(default=(4.0, 2.0), description="Sharpness of the regulariser: start, end.")

    @model_validator(mode="after")
    def _beta_falls(self) -> Self:
        if self.beta[0] < self.beta[1]:
            raise ValueError(f"beta: got {list(self.beta)}, wanted a start that is not below the end")
        return self
