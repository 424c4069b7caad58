"""The formats of weights, activations and attention that a recipe asks for, and its exceptions for some layers."""

from __future__ import annotations

from typing import Annotated, Any, Self, TypeVar

from pydantic import Field, ValidationError, model_validator

from quant_spec.enums import ActivationMode, Granularity, RangeMethod, UnknownTimestep
from quant_spec.messages import first_problem
from quant_spec.passes.step_bits import StepBits
from quant_spec.record import Bits, Count, Partial, Percentile, Record


class Weights(Record):
    """Format of the weights."""

    bits: Bits = 8
    symmetric: bool = False
    granularity: Granularity = Granularity.PER_CHANNEL
    group_size: Count | None = Field(default=None, description="Input channels per scale; only for per_group.")
    range: RangeMethod = RangeMethod.MINMAX
    percentile: Percentile = Field(default=0.9999, description="Share of values inside the range; only for percentile.")

    @model_validator(mode="after")
    def _has_group_size(self) -> Self:
        if (self.granularity is Granularity.PER_GROUP) != (self.group_size is not None):
            got = "null" if self.group_size is None else self.group_size
            wanted = "a size" if self.group_size is None else "null"
            raise ValueError(f"group_size: got {got} with granularity {self.granularity}, wanted {wanted}")
        return self


class Activations(Record):
    """Format of the layers' inputs; `bits` null keeps all of them, and attention, in full precision."""

    bits: Bits | None = None
    symmetric: bool = False
    mode: ActivationMode = ActivationMode.PER_STEP
    range: RangeMethod = RangeMethod.MINMAX
    percentile: Percentile = Field(default=0.9999, description="Share of values inside the range; only for percentile.")
    step_bits: StepBits | None = Field(
        default=None,
        description="Bits for each trajectory step, in place of `bits`, where no exception says other bits.",
    )
    unknown_timestep: UnknownTimestep = Field(
        default=UnknownTimestep.ERROR,
        description="At a timestep that was not calibrated for; nearest takes the nearest step, with a warning.",
    )

    @property
    def is_dynamic(self) -> bool:
        """Whether ranges are taken at run time."""
        return self.mode.startswith("dynamic")


class Attention(Record):
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


class LayerException(Record):
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


_S = TypeVar("_S", bound=Record)


def _merged(section: _S, partials: list[Any], path: str) -> _S:
    """Lay partial records over a whole one."""
    values = section.model_dump()
    for partial in partials:
        values |= partial.model_dump()
    try:
        return type(section).model_validate(values)
    except ValidationError as error:
        raise ValueError(first_problem(error, type(section), path)) from None
