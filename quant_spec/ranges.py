"""How the range of a weight or an activation is found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from quant_spec.enums import RangeMethod
from quant_spec.errors import QuantizationError


@dataclass(frozen=True, slots=True)
class RangeSpec:
    """A range estimator and its parameter: `percentile` is the share of values kept inside, two-sided, in (0.5, 1]."""

    method: RangeMethod = RangeMethod.MINMAX
    percentile: float = 0.9999

    def __post_init__(self) -> None:
        object.__setattr__(self, "method", RangeMethod(self.method))
        if not 0.5 < self.percentile <= 1:
            raise QuantizationError(f"percentile: got {self.percentile}, wanted more than 0.5 and at most 1")

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote."""
        return cls(**data)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able mapping, without what the method does not use."""
        percentile = {"percentile": self.percentile} if self.method is RangeMethod.PERCENTILE else {}
        return {"method": self.method.value, **percentile}
