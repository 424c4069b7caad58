"""Mix: put the states of units together from those that a menu has, each layer at the width chosen for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from quant_spec.record import Bits, Record, Share, SoftmaxBits
from quant_spec.task import Source, TaskInputs, TaskKind, TaskParams

STATE = "state"

#: One width for all trajectory steps, or one for each of so many equal ranges of them.
StepWidths = Annotated[tuple[Bits, ...], Field(min_length=1, max_length=64)]


class MixedLayer(Record):
    """What one layer takes from the menu; `activations` null where its input stays in full precision."""

    _omitted: ClassVar[frozenset[str]] = frozenset({"promoted", "promoted_bits"})

    weights: Bits
    promoted: Share = Field(default=0.0, description="Share of output channels at `promoted_bits`.")
    promoted_bits: Bits | None = None
    activations: StepWidths | None

    @model_validator(mode="after")
    def _promotes_to_something(self) -> Self:
        if bool(self.promoted) != (self.promoted_bits is not None):
            raise ValueError(f"promoted_bits: got {self.promoted_bits} with promoted {self.promoted:g}, wanted both")
        return self


class MixedAttention(Record):
    """What the matmuls of one attention take."""

    activations: StepWidths
    softmax: SoftmaxBits


class MixedUnit(Record):
    """What one unit takes; layers that are not named stay in full precision."""

    unit: str
    layers: dict[str, MixedLayer]
    attentions: dict[str, MixedAttention]


class Params(TaskParams):
    """What each unit takes."""

    units: tuple[MixedUnit, ...]


@dataclass(frozen=True, slots=True)
class Inputs(TaskInputs[Source]):
    """States of these units from the menu, in any order; `errors` if channels are promoted."""

    weights: tuple[Source, ...] = ()
    activations: tuple[Source, ...] = ()
    errors: tuple[Source, ...] = ()


KIND = TaskKind("mix", 1, "workers.tasks.mix:run", Params, Inputs, (f"{STATE}:*",))
