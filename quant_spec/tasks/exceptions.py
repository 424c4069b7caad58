"""Exceptions: leave in full precision, or give other bits, what trials say costs most, within a budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import Field

from quant_spec.passes.exceptions import ExceptionsChoice
from quant_spec.planned import Ranges
from quant_spec.record import Count
from quant_spec.task import Source, TaskInputs, TaskKind, TaskParams

STATE = "state"


class Params(ExceptionsChoice, TaskParams):
    """The budget, and the multiplications that it is a share of."""

    _omitted: ClassVar[frozenset[str]] = ExceptionsChoice._omitted | {"ranges", "seed", "forward_batch_size"}
    _only_if: ClassVar[Mapping[tuple[str, Any], frozenset[str]]] = {
        ("choices", ()): frozenset({"multiplications", "bytes", "all_macs"})
    }

    macs: dict[str, int] = Field(
        description="Layers, and attentions, that may be exceptions, with their multiplications at batch 1."
    )
    all_macs: int = Field(default=0, description="Multiplications of the whole model at batch 1.")
    ranges: dict[str, Ranges] = Field(
        default={}, description="How the range of each input is found whose bits are chosen; of these layers alone."
    )
    seed: int = Field(default=0, description="Of the values that ranges are found from.")
    forward_batch_size: Count = Field(default=1, description="Samples through the whole model at once.")


@dataclass(frozen=True, slots=True)
class Inputs(TaskInputs[Source]):
    """The model's tree, the state of each unit that was tried, in running order, and the damages of all groups.

    Where bits are chosen, shards of the calibration and the gains of steps too.
    """

    model: Source
    states: tuple[Source, ...]
    damages: tuple[Source, ...]
    calibration: tuple[Source, ...] = ()
    gains: Source | None = None


KIND = TaskKind("exceptions", 1, "workers.tasks.exceptions:run", Params, Inputs, (f"{STATE}:*",))
