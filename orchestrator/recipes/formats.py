"""The formats of weights, activations and attention that a recipe asks for, and its exceptions for some layers."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import Field, ValidationError, model_validator

from orchestrator.recipes.messages import first_problem
from orchestrator.recipes.sections import (
    ActivationMode,
    Bits,
    Count,
    Granularity,
    Partial,
    Percentile,
    Positive,
    RangeMethod,
    Section,
    Seed,
)


class Weights(Section):
    """Format of the weights."""

    bits: Bits = 8
    symmetric: bool = False
    granularity: Granularity = "per_channel"
    group_size: Count | None = Field(default=None, description="Input channels per scale; only for per_group.")
    range: RangeMethod = "minmax"
    percentile: Percentile = Field(default=0.9999, description="Share of values inside the range; only for percentile.")

    @model_validator(mode="after")
    def _has_group_size(self) -> Self:
        if (self.granularity == "per_group") != (self.group_size is not None):
            got = "null" if self.group_size is None else self.group_size
            wanted = "a size" if self.group_size is None else "null"
            raise ValueError(f"group_size: got {got} with granularity {self.granularity}, wanted {wanted}")
        return self


class StepBits(Section):
    """Activation bits chosen for each trajectory step, in place of one number for all."""

    choices: list[Bits] = Field(default=[4, 6, 8], min_length=2)
    method: Literal["joint", "effect", "snr", "early_low", "late_low"] = Field(
        default="joint",
        description="By the error of the final samples (joint counts that errors of steps add up, effect does not), by "
        "the signal-to-noise ratio of the prediction (PTQD), or simply in order.",
    )
    target_mean: Annotated[float, Field(ge=2, le=8)] = Field(
        default=6.0, description="Mean bits over the steps, at most."
    )
    threshold: Positive | None = Field(
        default=None,
        description="For snr, in place of target_mean: least ratio of the prediction's SNR to the noise schedule's.",
    )
    least_last: Bits | None = Field(
        default=None,
        description="For joint and effect: least bits of the last step, whose error nothing smooths; null is any.",
    )
    seeds: Count = Field(default=16, description="Seeds that effects are measured on.")
    first_seed: Seed = 3_000_000
    shard_seeds: Count = Field(default=8, description="Seeds per task.")

    @model_validator(mode="after")
    def _is_solvable(self) -> Self:
        if len(set(self.choices)) != len(self.choices) or self.choices != sorted(self.choices):
            raise ValueError(f"choices: got {self.choices}, wanted different bits in rising order")
        if self.threshold is not None and self.method != "snr":
            raise ValueError(f"threshold: got {self.threshold} with method {self.method}, wanted null")
        if self.least_last is not None and self.least_last > self.choices[-1]:
            raise ValueError(
                f"least_last: got {self.least_last}, wanted at most the greatest choice, {self.choices[-1]}"
            )
        if self.target_mean < self.choices[0]:
            raise ValueError(f"target_mean: got {self.target_mean:g}, wanted at least {self.choices[0]}")
        return self

    def parameters(self) -> dict[str, Any]:
        """Return what decides the choice among measured effects."""
        limit = {"target_mean": self.target_mean} if self.threshold is None else {"threshold": self.threshold}
        by_effect = self.method in ("joint", "effect")
        last = {"least_last": self.least_last} if by_effect and self.least_last is not None else {}
        return {"method": self.method, **limit, **last}


class Activations(Section):
    """Format of the layers' inputs; `bits` null keeps all of them, and attention, in full precision."""

    bits: Bits | None = None
    symmetric: bool = False
    mode: ActivationMode = "per_step"
    range: RangeMethod = "minmax"
    percentile: Percentile = Field(default=0.9999, description="Share of values inside the range; only for percentile.")
    step_bits: StepBits | None = Field(
        default=None,
        description="Bits for each trajectory step, in place of `bits`, where no exception says other bits.",
    )
    unknown_timestep: Literal["error", "nearest"] = Field(
        default="error",
        description="At a timestep that was not calibrated for; nearest takes the nearest step, with a warning.",
    )

    @property
    def is_dynamic(self) -> bool:
        """Whether ranges are taken at run time."""
        return self.mode.startswith("dynamic")


class Attention(Section):
    """The matmuls of attention: query, key and value at `bits`, probabilities at `softmax_bits`."""

    enabled: bool = True
    bits: Bits = 8
    softmax_bits: Bits = 8


class WeightsException(Partial):
    """What differs from `weights` in some layers."""

    bits: Bits | None = None
    symmetric: bool | None = None
    granularity: Granularity | None = None
    group_size: Count | None = None
    range: RangeMethod | None = None
    percentile: Percentile | None = None


class ActivationsException(Partial):
    """What differs from `activations` in some layers; `bits: null` keeps their inputs in full precision."""

    bits: Bits | None = None
    symmetric: bool | None = None
    mode: ActivationMode | None = None
    range: RangeMethod | None = None
    percentile: Percentile | None = None


class LayerException(Section):
    """Layers that are treated differently; of several entries that match a layer, later ones win."""

    match: Annotated[str, Field(pattern=r"^(@first|@last|[^@].*)$")] = Field(
        description="Glob over layer and attention names, or @first or @last."
    )
    weights: WeightsException = WeightsException()
    activations: ActivationsException = ActivationsException()
    keep: bool = Field(default=False, description="Keep in full precision.")
    required: bool = Field(default=True, description="Whether it is an error if a model has no such layer.")


def weights_for(weights: Weights, entries: list[LayerException], path: str = "weights") -> Weights:
    """Return the weight format after the exceptions that match, in order; ValueError names `path`."""
    return _merged(weights, [entry.weights for entry in entries], path)


def activations_for(activations: Activations, entries: list[LayerException], path: str = "activations") -> Activations:
    """Return the activation format after the exceptions that match, in order; ValueError names `path`.

    A recipe that quantizes weights only has no exceptions from that.
    """
    if activations.bits is None:
        return activations
    return _merged(activations, [entry.activations for entry in entries], path)


_S = TypeVar("_S", bound=Section)


def _merged(section: _S, partials: list[Any], path: str) -> _S:
    """Lay partial sections over a whole one."""
    values = section.model_dump()
    for partial in partials:
        values |= partial.model_dump()
    try:
        return type(section).model_validate(values)
    except ValidationError as error:
        raise ValueError(first_problem(error, type(section), path)) from None
