"""Channel errors: what the bits of output channels do, for the layers of a group of units."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import Field

from quant_spec.enums import RoundingMethod
from quant_spec.passes.allocate import AllocateMeasure
from quant_spec.planned import Unit
from quant_spec.record import NotNegative
from quant_spec.task import Source, TaskInputs, TaskKind, UnitsParams

ERRORS = "errors"


class Params(AllocateMeasure, UnitsParams):
    """The units, which of their layers to measure, on how much, and how their weights will be rounded."""

    _only_if: ClassVar[Mapping[tuple[str, Any], frozenset[str]]] = {
        ("rounding", RoundingMethod.CLOSED_FORM): frozenset({"damping", "correct_bias"}),
    }

    _omitted: ClassVar[frozenset[str]] = frozenset({"correct_bias"})

    units: tuple[Unit, ...]
    layers: tuple[str, ...]
    rounding: RoundingMethod = Field(default=RoundingMethod.CLOSED_FORM, description="Of the weights, later.")
    damping: NotNegative = Field(default=0.03, description="Share of the mean diagonal added to the Hessian.")
    correct_bias: bool = Field(default=False, description="Whether biases will take the mean error.")


@dataclass(frozen=True, slots=True)
class Inputs(TaskInputs[Source]):
    """The model's tree, shards of its calibration; what `scale` chose for each unit, if channels are scaled."""

    model: Source
    calibration: tuple[Source, ...]
    factors: tuple[Source, ...] = ()


KIND = TaskKind("channel_errors", 4, "workers.tasks.channel_errors:run", Params, Inputs, (ERRORS,), gpu=True)
