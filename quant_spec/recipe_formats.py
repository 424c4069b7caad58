"""The formats of weights, activations and attention that a recipe asks for, and its exceptions for some layers."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Self, TypeVar

from pydantic import Field, ValidationError, model_validator

from quant_spec.enums import ActivationMode, Granularity, GroupScale, NumberType, RangeMethod, UnknownTimestep
from quant_spec.keys import canonical_json
from quant_spec.messages import first_problem
from quant_spec.passes.step_bits import StepBits
from quant_spec.record import Bits, Count, Grown, Partial, Percentile, Record, Share, SoftmaxBits

_ESCAPED = re.compile(r"\[([*?[])\]")


class Weights(Grown):
    """Format of the weights."""

    _later: ClassVar[frozenset[str]] = frozenset({"type", "group_scale"})

    bits: Bits = Field(
        default=8, description="Bits of a code (single output channels may have 1, see passes.allocate)."
    )
    symmetric: bool = Field(default=False, description="Whether the zero point is fixed in the middle of the codes.")
    granularity: Granularity = Field(
        default=Granularity.PER_CHANNEL,
        description="Weights that share one scale: all, those of one output channel, or of group_size input channels "
        "in it.",
    )
    group_size: Count | None = Field(default=None, description="Input channels per scale; only for per_group.")
    range: RangeMethod = Field(
        default=RangeMethod.MINMAX,
        description="How the range is found: mse searches the one with the smallest error, percentile leaves outliers "
        "out.",
    )
    percentile: Percentile = Field(default=0.9999, description="Share of values inside the range; only for percentile.")
    type: NumberType = Field(
        default=NumberType.INT, description="int, codes of so many bits; or e4m3, floats of 8 bits (FP8)."
    )
    group_scale: GroupScale = Field(
        default=GroupScale.FLOAT,
        description="Scales of groups: float, a bfloat16 each; or integer, a whole number up to 16 times the output "
        "channel's scale, with which codes are integers of 8 bits (8-bit codes then have scales per channel); only "
        "for per_group.",
    )

    @model_validator(mode="after")
    def _has_group_size(self) -> Self:
        if self.type is NumberType.E4M3 and (self.bits != 8 or self.granularity is Granularity.PER_GROUP):
            raise ValueError(
                f"type: got e4m3 with {self.bits} bits {self.granularity}, wanted 8 bits per_channel or per_tensor"
            )
        if (self.granularity is Granularity.PER_GROUP) != (self.group_size is not None):
            got = "null" if self.group_size is None else self.group_size
            wanted = "a size" if self.group_size is None else "null"
            raise ValueError(f"group_size: got {got} with granularity {self.granularity}, wanted {wanted}")
        return self


class Activations(Grown):
    """Format of the layers' inputs; `bits` null keeps all of them, and attention, in full precision."""

    _later: ClassVar[frozenset[str]] = frozenset({"type"})

    bits: Bits | None = Field(
        default=None,
        description="Bits of a code; null keeps all inputs, and attention, in full precision: weights only.",
    )
    symmetric: bool = Field(default=False, description="Whether the zero point is fixed in the middle of the codes.")
    mode: ActivationMode = Field(
        default=ActivationMode.PER_STEP,
        description="Whether one range holds for each trajectory step, one in all (static), or they are taken at run "
        "time of each sample or token (dynamic).",
    )
    range: RangeMethod = Field(
        default=RangeMethod.MINMAX,
        description="How a range is found: mse searches the one with the smallest error, percentile leaves outliers "
        "out.",
    )
    percentile: Percentile = Field(default=0.9999, description="Share of values inside the range; only for percentile.")
    step_bits: StepBits | None = Field(
        default=None,
        description="Bits for each trajectory step, in place of bits, in layers whose bits no exception states.",
    )
    unknown_timestep: UnknownTimestep = Field(
        default=UnknownTimestep.ERROR,
        description="At a timestep that was not calibrated for; nearest takes the nearest step, with a warning.",
    )
    type: NumberType = Field(
        default=NumberType.INT, description="int, codes of so many bits; or e4m3, floats of 8 bits (FP8)."
    )

    @model_validator(mode="after")
    def _fits_type(self) -> Self:
        if self.type is NumberType.E4M3 and (self.bits not in (None, 8) or self.step_bits is not None):
            raise ValueError(f"type: got e4m3 with bits {self.bits}, wanted 8 at every step")
        return self

    @property
    def is_dynamic(self) -> bool:
        """Whether ranges are taken at run time."""
        return self.mode.startswith("dynamic")


class Attention(Grown):
    """The matmuls of attention: query, key and value at `bits`, probabilities at `softmax_bits`."""

    _later: ClassVar[frozenset[str]] = frozenset({"mode"})

    enabled: bool = Field(
        default=True, description="Whether the matmuls are quantized, with the symmetry and range of activations."
    )
    mode: ActivationMode | None = Field(
        default=None,
        description="As in activations, for query, key, value and probabilities; null: as activations.mode.",
    )
    bits: Bits = Field(default=8, description="Bits of query, key and value.")
    softmax_bits: SoftmaxBits = Field(
        default=8, description="Bits of the probabilities; 16 leaves them as they are, at any bits of the others."
    )


class WeightsException(Partial):
    """What differs from `weights` in some layers."""

    bits: Bits | None = Field(default=None, description="As in weights.")
    symmetric: bool | None = Field(default=None, description="As in weights.")
    granularity: Granularity | None = Field(default=None, description="As in weights.")
    group_size: Count | None = Field(default=None, description="As in weights.")
    range: RangeMethod | None = Field(default=None, description="As in weights.")
    percentile: Percentile | None = Field(default=None, description="As in weights.")
    promoted: Share | None = Field(
        default=None,
        description="Share of the output channels that get the menu's next width, those that gain most; only with "
        "passes.menu, for an exact name.",
    )
    type: NumberType | None = Field(default=None, description="As in weights.")
    group_scale: GroupScale | None = Field(default=None, description="As in weights.")


class ActivationsException(Partial):
    """What differs from `activations` in some layers; `bits: null` keeps their inputs in full precision."""

    bits: Bits | None = Field(default=None, description="As in activations; null keeps these inputs in full precision.")
    symmetric: bool | None = Field(default=None, description="As in activations.")
    mode: ActivationMode | None = Field(default=None, description="As in activations.")
    range: RangeMethod | None = Field(default=None, description="As in activations.")
    percentile: Percentile | None = Field(default=None, description="As in activations.")
    range_bits: Annotated[tuple[Bits, ...], Field(min_length=1, max_length=64)] | None = Field(
        default=None,
        description="Bits for each of so many equal ranges of trajectory steps, in place of bits; only with "
        "passes.menu, for an exact name, mode per_step.",
    )
    type: NumberType | None = Field(default=None, description="As in activations.")


class LayerException(Record):
    """Layers that are treated differently; of several entries that match a layer, later ones win."""

    match: Annotated[str, Field(pattern=r"^(@first|@last|[^@].*)$", max_length=1000)] = Field(
        description="Glob over the names of layers and attentions (* also matches dots); @first is the layer that "
        "reads the sample, @last the one that writes the prediction. With an attention's exact name, activations.bits "
        "are those of its query, key, value and probabilities."
    )
    weights: WeightsException = Field(default=WeightsException(), description="What differs from weights.")
    activations: ActivationsException = Field(
        default=ActivationsException(), description="What differs from activations."
    )
    keep: bool = Field(default=False, description="Keep in full precision; a later entry that matches quantizes again.")
    required: bool = Field(default=True, description="Whether it is an error if the model has no such layer.")


def exact_name(pattern: str) -> str | None:
    """Return the one name that a pattern matches, whose special characters are escaped; None if it may match others."""
    if pattern.startswith("@") or any(character in _ESCAPED.sub("", pattern) for character in "*?["):
        return None
    return _ESCAPED.sub(r"\1", pattern)


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
    values = section.model_dump(mode="json")
    for partial in partials:
        values |= {name: value for name, value in partial.model_dump(mode="json").items() if name in values}
    try:
        return type(section).model_validate_json(canonical_json(values))
    except ValidationError as error:
        raise ValueError(first_problem(error, type(section), path)) from None
