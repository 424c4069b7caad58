"""What records are made of: strict frozen mappings, and the types of their fields."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from quant_spec.errors import InvalidInputError
from quant_spec.keys import canonical_json
from quant_spec.messages import first_problem, shown

Bits = Literal[2, 3, 4, 5, 6, 8]
SoftmaxBits = Literal[2, 3, 4, 5, 6, 8, 16]
# Every number has an upper bound: far above what is of use, and low enough that nobody plans, or waits, for ever.
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Seed = Annotated[int, Field(ge=0, lt=2**62)]
Percentile = Annotated[float, Field(gt=0.5, le=1)]
Positive = Annotated[float, Field(gt=0, le=1e9)]
NotNegative = Annotated[float, Field(ge=0, le=1e9)]
Share = Annotated[float, Field(ge=0, lt=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Record(BaseModel):
    """A frozen mapping that refuses unknown keys, values of another type, and numbers that are not finite.

    `model_dump` gives every field, which is what a recipe's digest is made of. `to_json` gives what names a task:
    without the fields that cannot matter, so that records which differ only there share their tasks.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True)

    #: (field, value) -> the fields that matter only if the field has that value
    _only_if: ClassVar[Mapping[tuple[str, Any], frozenset[str]]] = {}
    #: fields that are left out where they have their default
    _omitted: ClassVar[frozenset[str]] = frozenset()

    def idle_fields(self) -> set[str]:
        """Return the fields that cannot matter under the values of the others."""
        return {name for (key, value), names in self._only_if.items() if getattr(self, key) != value for name in names}

    def why_idle(self, name: str) -> str:
        """Return the values of other fields under which an idle field would matter, or nothing if that is no list."""
        needed = [(key, value) for (key, value), names in self._only_if.items() if name in names]
        return " and ".join(f"{key} {shown(to_json(value)).strip(chr(39))}" for key, value in needed)

    def to_json(self) -> dict[str, Any]:
        """Return the fields that can matter, as JSON."""
        defaults = {name for name in self._omitted if getattr(self, name) == type(self).model_fields[name].default}
        left_out = self.idle_fields() | defaults
        return {name: to_json(getattr(self, name)) for name in type(self).model_fields if name not in left_out}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote, and nothing else: no unknown, missing or idle field.

        Raises
        ------
        InvalidInputError
            If it is anything else.
        """
        try:
            record = cls.model_validate_json(canonical_json(data))
        except ValidationError as error:
            raise InvalidInputError(first_problem(error, cls)) from None
        given, wanted = dict(data), record.to_json()
        if canonical_json(given) != canonical_json(wanted):
            raise InvalidInputError(f"got {', '.join(_differences(given, wanted))}, wanted {', '.join(sorted(wanted))}")
        return record

    def replaced(self, **changes: Any) -> Self:
        """Return the record with some fields changed, checked again."""
        return type(self)(**{name: getattr(self, name) for name in type(self).model_fields} | changes)


class Partial(Record):
    """A mapping that says only what differs: what was not stated is not there, and null is a value."""

    @model_serializer(mode="wrap")
    def _only_stated(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if name in self.model_fields_set}


class Grown(Record):
    """A mapping that got fields later: `_later` are left out of its JSON at their default, so that digests stay."""

    _later: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def _without_later_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        defaults = {name for name in self._later if getattr(self, name) == type(self).model_fields[name].default}
        return {name: value for name, value in handler(self).items() if name not in defaults}


def _differences(told: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Say what makes a mapping, whose fields are right one by one, other than what a record writes."""
    missing = [f"no {name}" for name in sorted(wanted.keys() - told.keys())]
    idle = [f"{name}, which cannot matter beside the others" for name in sorted(told.keys() - wanted.keys())]
    other = []
    for name in sorted(told.keys() & wanted.keys()):
        if told[name] != wanted[name]:
            other.append(f"{name} {shown(told[name])}, of which not all is known")
        elif canonical_json(told[name]) != canonical_json(wanted[name]):
            # 1 and 1.0 are one number and two texts, which name different tasks.
            other.append(f"{name} {shown(told[name])}, which is written {shown(wanted[name])}")
    return missing + idle + other


def to_json(value: Any) -> Any:
    """Return a field's value as JSON: records and formats by their own `to_json`, tuples as lists, choices as text."""
    if hasattr(value, "to_json"):
        return value.to_json()
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {name: to_json(item) for name, item in value.items()}
    return [to_json(item) for item in value] if isinstance(value, list | tuple) else value
