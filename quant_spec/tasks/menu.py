"""Menu: round a group of units once at each width, so that any choice of bits is put together from what is there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from quant_spec.passes.menu import Menu
from quant_spec.passes.round import RoundFit
from quant_spec.planned import Unit
from quant_spec.task import Source, TaskInputs, TaskKind, UnitsParams

#: States with the weights of all layers at one width, `weights:BITS:UNIT`.
WEIGHTS = "weights"
#: States with activation tables, `activations:BITS:UNIT`; BITS is `base` for those of the units' own formats.
ACTIVATIONS = "activations"
#: Error power at a layer's output that each output channel makes at each width, `errors:UNIT`.
ERRORS = "errors"
BASE = "base"


class Params(Menu, RoundFit, UnitsParams):
    """The units in the base recipe's formats, the widths, and how weights are rounded."""

    _omitted: ClassVar[frozenset[str]] = frozenset({"activation_bits", "correct_bias"})

    units: tuple[Unit, ...]


@dataclass(frozen=True, slots=True)
class Inputs(TaskInputs[Source]):
    """The model's tree, shards of its calibration; what `scale` chose for each unit, if channels are scaled."""

    model: Source
    calibration: tuple[Source, ...]
    factors: tuple[Source, ...] = ()


def menu_output(output: str, width: int | str, unit: str) -> str:
    """Return the name of a unit's state at one width."""
    return f"{output}:{width}:{unit}"


KIND = TaskKind(
    "menu",
    1,
    "workers.tasks.menu:run",
    Params,
    Inputs,
    (f"{WEIGHTS}:*", f"{ACTIVATIONS}:*", f"{ERRORS}:*"),
    gpu=True,
)
