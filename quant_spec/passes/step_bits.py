"""Step bits: activation bits chosen for each trajectory step (PTQD, Sec. 3.4), in place of one number for all."""

from __future__ import annotations

from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from quant_spec.enums import StepBitsMethod
from quant_spec.record import Bits, Count, Record, Seed


class StepBitsChoice(Record):
    """How bits are chosen, given what they do."""

    _omitted: ClassVar[frozenset[str]] = frozenset({"threshold", "least_last"})

    method: StepBitsMethod = Field(
        default=StepBitsMethod.JOINT,
        description="By the error of the final samples when each step alone is quantized (joint counts that errors of "
        "different steps add up, effect does not); by the prediction's signal-to-noise ratio (snr, PTQD's rule); or "
        "least bits at the noisiest steps, or at the others.",
    )
    target_mean: Annotated[float, Field(ge=2, le=8)] = Field(
        default=6.0, description="Mean bits over the steps, at most."
    )
    threshold: Annotated[float, Field(gt=0, le=1e18)] | None = Field(
        default=None,
        description="For snr, in place of target_mean: a step takes the least bits whose prediction has so many times "
        "the signal-to-noise ratio (of powers) of the noise schedule.",
    )
    least_last: Bits | None = Field(
        default=None,
        description="For joint and effect: least bits of the last step, whose error is small but goes into the image "
        "unsmoothed; null is any.",
    )

    def idle_fields(self) -> set[str]:
        """Return the fields that cannot matter: a threshold stands in place of a mean."""
        by_effect = self.method in (StepBitsMethod.JOINT, StepBitsMethod.EFFECT)
        idle = set() if self.threshold is None else {"target_mean"}
        return super().idle_fields() | idle | (set() if by_effect else {"least_last"})


class StepBits(StepBitsChoice):
    """Activation bits chosen for each trajectory step, in place of one number for all."""

    choices: list[Bits] = Field(default=[4, 6, 8], min_length=2, max_length=6, description="Bits to choose from.")
    seeds: Count = Field(default=16, description="Seeds that effects are measured on.")
    first_seed: Seed = Field(default=3_000_000, description="First of their seeds.")
    shard_seeds: Count = Field(default=8, description="Seeds per task.")

    @model_validator(mode="after")
    def _is_solvable(self) -> Self:
        if len(set(self.choices)) != len(self.choices) or self.choices != sorted(self.choices):
            raise ValueError(f"choices: got {self.choices}, wanted different bits in rising order")
        if self.threshold is not None and self.method is not StepBitsMethod.SNR:
            raise ValueError(f"threshold: got {self.threshold} with method {self.method}, wanted null")
        if self.least_last is not None and self.least_last > self.choices[-1]:
            raise ValueError(
                f"least_last: got {self.least_last}, wanted at most the greatest choice, {self.choices[-1]}"
            )
        if self.target_mean < self.choices[0]:
            raise ValueError(f"target_mean: got {self.target_mean:g}, wanted at least {self.choices[0]}")
        return self
