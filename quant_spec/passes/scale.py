"""Scale: choose what input channels are divided by and weights multiplied with (DMQ), before rounding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, model_validator

from quant_spec.enums import Scaling, Shift, Weighting
from quant_spec.record import Count, Fraction, Positive, Record, Share


class Scale(Record):
    """Choose what input channels are divided by and weights multiplied with (DMQ), before rounding."""

    _only_if: ClassVar[Mapping[tuple[str, Any], frozenset[str]]] = {
        ("method", Scaling.LEARNED): frozenset(
            {"iterations", "lr", "weighting", "positions", "held_out", "alpha", "xi", "half_life"}
        ),
        ("method", Scaling.SMOOTH): frozenset({"exponent"}),
        ("weighting", Weighting.ADAPTIVE): frozenset({"alpha", "xi"}),
        ("weighting", Weighting.EARLY): frozenset({"half_life"}),
        ("shift", Shift.VARIANCE): frozenset({"least_spread"}),
    }
    _omitted: ClassVar[frozenset[str]] = frozenset({"held_out"})

    method: Scaling = Field(
        default=Scaling.LEARNED,
        description="Learned for the error that quantizing both tensors is expected to leave at the layer's output; "
        "smooth, SmoothQuant's closed form; or no scales.",
    )
    exponent: Fraction = Field(
        default=0.5, description="For smooth: exponent of the activations' range; the weights' has 1 less that."
    )
    iterations: Count = Field(default=200, description="Iterations of Adam.")
    lr: Positive = Field(default=2e-2, description="Rate of Adam, falling to 0.")
    weighting: Weighting = Field(
        default=Weighting.ADAPTIVE,
        description="How errors of trajectory steps add up: adaptive favours steps of small error (DMQ), early the "
        "noisiest, whose errors all that follows works on.",
    )
    alpha: Positive = Field(default=20.0, description="Exponent of the adaptive weights.")
    xi: Share = Field(default=0.95, description="Momentum of the errors that the adaptive weights are made from.")
    half_life: Positive = Field(
        default=0.05, description="For early: share of the trajectory after which a step counts half."
    )
    samples: Count = Field(
        default=32,
        description="Calibration seeds that second moments are taken over, and that vote on shifts, at most.",
    )
    positions: Count = Field(
        default=16, description="Output positions per sample that second moments are taken over, at most."
    )
    shift: Shift = Field(
        default=Shift.NONE,
        description="Layers with a power-of-two step for each channel and trajectory step: those that read a "
        "concatenation (with skip_split), or whose channels' ranges differ much.",
    )
    consensus: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.85,
        description="Share of the samples that must agree on a channel's power of two; else, and where the error of "
        "all samples would not fall, it has the step of the measured range.",
    )
    least_spread: Positive = Field(
        default=0.5, description="For variance: least standard deviation of the channels' ranges, over their mean."
    )
    held_out: Share = Field(
        default=0.0,
        description="Share of the calibration seeds that learned scales do not see, so that ranges, measured on all, "
        "have room for what is new; at 8 bits, clipping costs more than scales gain without it.",
    )

    def idle_fields(self) -> set[str]:
        """Return the fields that cannot matter; samples are looked at for shifts, and to learn."""
        idle = super().idle_fields()
        if self.shift is not Shift.NONE:
            return idle
        return idle | ({"consensus"} if self.method is Scaling.LEARNED else {"consensus", "samples"})

    @model_validator(mode="after")
    def _does_something(self) -> Self:
        if self.method is Scaling.NONE and self.shift is Shift.NONE:
            raise ValueError("method: got none with shift none, wanted one of them to do something")
        return self
