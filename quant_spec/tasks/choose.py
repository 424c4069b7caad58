"""Choose: each layer's weight bits from tables of sensitivities within a budget, and the states that have them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from quant_spec.passes.choose import ChooseBudget
from quant_spec.record import Bits
from quant_spec.task import Source, TaskInputs, TaskKind, TaskParams
from quant_spec.tasks.mix import MixedUnit

STATE = "state"


class Params(ChooseBudget, TaskParams):
    """The budget, and what each unit takes from the menu if its layers have the recipe's own bits."""

    _omitted: ClassVar[frozenset[str]] = ChooseBudget._omitted | {"fixed"}

    units: tuple[MixedUnit, ...] = Field(description="In the order in which they run.")
    widths: tuple[Annotated[tuple[Bits, ...], Field(max_length=7)], ...] = Field(
        description="Widths that there are states with weights of, for each of the units."
    )
    fixed: tuple[str, ...] = Field(default=(), description="Layers that have the bits that `units` says.")


@dataclass(frozen=True, slots=True)
class Inputs(TaskInputs[Source]):
    """Tables of all groups; states of the menu: weights by unit and width as `widths` has them, activation tables."""

    tables: tuple[Source, ...]
    weights: tuple[Source, ...] = ()
    activations: tuple[Source, ...] = ()


KIND = TaskKind("choose", 1, "workers.tasks.choose:run", Params, Inputs, (f"{STATE}:*",))
