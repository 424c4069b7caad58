"""A unit as its tasks are told of it: formats, how ranges are found, and what is still to be chosen.

Formats (`quant_spec.formats`) say how numbers are stored. Before they are complete, activation bits may be open (they
are chosen for each trajectory step meanwhile), and output channels may get bits of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Self

from pydantic import PlainValidator

from quant_spec.enums import ActivationMode, NumberType
from quant_spec.errors import QuantizationError
from quant_spec.formats import ActivationSpec, AttentionSpec, LayerSpec, WeightSpec, check_bits
from quant_spec.messages import shown
from quant_spec.ranges import RangeSpec


@dataclass(frozen=True, slots=True)
class PlannedActivation:
    """Format of an activation; `bits` None where each trajectory step will have its own."""

    bits: int | None
    symmetric: bool = False
    mode: ActivationMode = ActivationMode.PER_STEP
    type: NumberType = NumberType.INT

    def __post_init__(self) -> None:
        if self.bits is not None:
            check_bits(self.bits, "activation")
        object.__setattr__(self, "mode", ActivationMode(self.mode))
        object.__setattr__(self, "type", NumberType(self.type))

    def spec(self, step_bits: Sequence[int] | None = None) -> ActivationSpec:
        """Return the format with its bits, those of each step if they were open.

        Raises
        ------
        QuantizationError
            If they are open and none are given.
        """
        if self.bits is not None:
            return ActivationSpec(self.bits, self.symmetric, self.mode, type=self.type)
        if step_bits is None:
            raise QuantizationError("activation: got null bits, wanted a number, or bits chosen for each step")
        return ActivationSpec(max(step_bits), self.symmetric, self.mode, tuple(step_bits))

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able mapping."""
        number = {} if self.type is NumberType.INT else {"type": self.type.value}
        return {"bits": self.bits, "symmetric": self.symmetric, "mode": self.mode.value, **number}


@dataclass(frozen=True, slots=True)
class PlannedLayer:
    """A Conv or Linear layer that will be quantized.

    `activation` and `activation_range` are None where its input stays in full precision (the latter also where ranges
    are dynamic); `split` as in `LayerSpec`; `allocated` where output channels will get bits of their own around the
    weight's.
    """

    weight: WeightSpec
    weight_range: RangeSpec
    activation: PlannedActivation | None = None
    activation_range: RangeSpec | None = None
    split: tuple[int, ...] | None = None
    allocated: bool = False

    @property
    def has_open_bits(self) -> bool:
        """Whether activation bits will be chosen for each trajectory step."""
        return self.activation is not None and self.activation.bits is None

    def with_bits(self, bits: int) -> Self:
        """Return the layer with these activation bits where they are open."""
        if self.activation is None or self.activation.bits is not None:
            return self
        return replace(self, activation=replace(self.activation, bits=bits))

    def spec(self, step_bits: Sequence[int] | None = None) -> LayerSpec:
        """Return the format, with the bits of each step where activation bits are open."""
        activation = None if self.activation is None else self.activation.spec(step_bits)
        return LayerSpec(self.weight, activation, self.split)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote."""
        activation, ranges, split = data["activation"], data["activation_range"], data["split"]
        return cls(
            weight=WeightSpec(**data["weight"]),
            weight_range=RangeSpec.from_json(data["weight_range"]),
            activation=None if activation is None else PlannedActivation(**activation),
            activation_range=None if ranges is None else RangeSpec.from_json(ranges),
            split=None if split is None else tuple(split),
            allocated=data.get("allocated", False),
        )

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able mapping; it says nothing of allocation where there is none."""
        return {
            **({"allocated": True} if self.allocated else {}),
            "weight": self.weight.to_json(),
            "weight_range": self.weight_range.to_json(),
            "activation": None if self.activation is None else self.activation.to_json(),
            "activation_range": None if self.activation_range is None else self.activation_range.to_json(),
            "split": None if self.split is None else list(self.split),
        }


@dataclass(frozen=True, slots=True)
class PlannedAttention:
    """The matmuls of one attention: as `AttentionSpec`, and how the ranges of its operands are found."""

    activation: PlannedActivation
    activation_range: RangeSpec | None = None
    softmax_bits: int = 8

    def spec(self) -> AttentionSpec:
        """Return the format."""
        return AttentionSpec(self.activation.spec(), self.softmax_bits)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote."""
        ranges = data["activation_range"]
        return cls(
            PlannedActivation(**data["activation"]),
            None if ranges is None else RangeSpec.from_json(ranges),
            data["softmax_bits"],
        )

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able mapping."""
        return {
            "activation": self.activation.to_json(),
            "activation_range": None if self.activation_range is None else self.activation_range.to_json(),
            "softmax_bits": self.softmax_bits,
        }


@dataclass(frozen=True, slots=True)
class PlannedUnit:
    """What will be quantized of one unit, by module name."""

    unit: str
    layers: Mapping[str, PlannedLayer]
    attentions: Mapping[str, PlannedAttention]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote."""
        return cls(
            data["unit"],
            {name: PlannedLayer.from_json(layer) for name, layer in data["layers"].items()},
            {name: PlannedAttention.from_json(attention) for name, attention in data["attentions"].items()},
        )

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able mapping."""
        return {
            "unit": self.unit,
            "layers": {name: layer.to_json() for name, layer in self.layers.items()},
            "attentions": {name: attention.to_json() for name, attention in self.attentions.items()},
        }

    def before_allocation(self) -> Self:
        """Return the unit as tasks are told of it that lie before the allocation: it says nothing of one to come."""
        return replace(self, layers={name: replace(layer, allocated=False) for name, layer in self.layers.items()})


@dataclass(frozen=True, slots=True)
class VariedLayer:
    """What is known of a layer whose activation bits are to be chosen: all of its input's format but the bits."""

    symmetric: bool
    range: RangeSpec
    split: tuple[int, ...] | None

    def spec(self, bits: int) -> LayerSpec:
        """Return the format with these bits; the weight's is never used."""
        return LayerSpec(WeightSpec(8), ActivationSpec(bits, self.symmetric), self.split)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote."""
        split = data["split"]
        return cls(data["symmetric"], RangeSpec.from_json(data["range"]), None if split is None else tuple(split))

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able mapping."""
        split = None if self.split is None else list(self.split)
        return {"symmetric": self.symmetric, "range": self.range.to_json(), "split": split}


def _reader(cls: type[Any]) -> PlainValidator:
    """Read a field of a record from the JSON that the class itself reads."""

    def read(value: Any) -> Any:
        if isinstance(value, cls):
            return value
        try:
            return cls.from_json(value)
        except KeyError as error:
            raise QuantizationError(f"{error.args[0]}: got none, wanted one") from None
        except (TypeError, AttributeError) as error:
            raise QuantizationError(f"format: got {shown(value)}, wanted that of a {cls.__name__} ({error})") from None

    return PlainValidator(read)


#: For fields of records.
Unit = Annotated[PlannedUnit, _reader(PlannedUnit)]
Layer = Annotated[PlannedLayer, _reader(PlannedLayer)]
Attention = Annotated[PlannedAttention, _reader(PlannedAttention)]
Varied = Annotated[VariedLayer, _reader(VariedLayer)]
Ranges = Annotated[RangeSpec, _reader(RangeSpec)]
