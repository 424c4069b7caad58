"""What all sections of a recipe are made of: strict frozen records, and the types of their fields."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

Bits = Literal[2, 3, 4, 5, 6, 8]
Granularity = Literal["per_tensor", "per_channel", "per_group"]
RangeMethod = Literal["minmax", "mse", "percentile"]
ActivationMode = Literal["static", "per_step", "dynamic_sample", "dynamic_token"]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**62)]
Percentile = Annotated[float, Field(gt=0.5, le=1)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A mapping of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True)


class Partial(Section):
    """A mapping that says only what differs: what was not stated is not there, and null is a value."""

    @model_serializer(mode="wrap")
    def _only_stated(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if name in self.model_fields_set}
